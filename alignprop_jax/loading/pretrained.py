"""Where a model is that people name, and networks that lie in a folder of their own."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from alignprop_jax.errors import UserError
from alignprop_jax.loading import hub
from alignprop_jax.loading.sources import FolderSource
from alignprop_jax.loading.weights import ParamTree
from alignprop_jax.nn.execution import Execution

ASSETS = Path(__file__).parents[1] / "assets"
EMOJI = "emoji"
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Of files that hold a whole model."""

_IN_FLOAT32 = Execution()


def resolve_model(
    model: str | Path, download: Callable[[hub.HubName], Path] = hub.download_model
) -> Path:
    """The local folder of a model.

    Args:
        model: as for `locate_model`, but no file.
        download: gets what is needed from the hub.

    Raises:
        UserError: there is no such model, or it cannot be had.
    """
    path, _ = locate_model(model, download)
    if os.path.isfile(path):
        raise UserError(f"{model}: a folder is needed here, and this is a file")
    return path


def locate_model(
    model: str | Path, download: Callable[[hub.HubName], Path]
) -> tuple[Path, str | None]:
    """The folder or file of a model, and the variant of its weights if one was asked for.

    Args:
        model: a diffusers folder, a single-file checkpoint, `emoji` for the model in the package,
            or on the Hugging Face hub OWNER/NAME[@REVISION] or OWNER/NAME[@REVISION]/FILE, which
            is downloaded (once). A folder or a hub id may end in :VARIANT of its weights, such as
            :fp16; a part that has none of it is read without.
        download: gets what is needed from the hub.

    Raises:
        UserError: there is no such model, or it cannot be had.
    """
    if str(model) == EMOJI:
        folder = ASSETS / EMOJI
        if not folder.is_dir():
            raise UserError(
                f"{folder}: the model of the package is missing; install the package again"
            )
        return folder, None
    # Of a name that is too long, or of nobody's home, these say no where Path raises.
    try:
        path = os.path.expanduser(model)
    except ValueError:  # No user has half of a surrogate pair in its name.
        path = str(model)
    if os.path.exists(path):
        return Path(path), None
    before, _, variant = path.rpartition(":")
    if variant and os.path.isdir(before):
        return Path(before), variant
    name = hub.HubName.parse(str(model))
    # A path that is mistyped may look like a hub id, whose last part is a file where it ends so.
    if name is None or (Path(str(model)).suffix in SUFFIXES) != bool(name.file):
        raise UserError(
            f"{model}: no such folder or file; a model is a diffusers folder, a single file, "
            f"a hub id or {EMOJI}"
        )
    if name.file:
        return hub.download_file(str(model)), None
    return download(name), name.variant


def resolve_network(model: str | Path, emoji_part: str) -> Path:
    """The local folder of one network of transformers, as `resolve_model` finds it.

    Args:
        emoji_part: the folder that `emoji`, which holds several, means here.
    """
    folder = resolve_model(model)
    return folder / emoji_part if str(model) == EMOJI else folder


def resolve_tokenizer(model: str | Path) -> Path:
    """The local folder of a tokenizer: of its own, of a CLIP, or within a pipeline."""
    folder = resolve_model(model, hub.download_tokenizer)
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder


def load_component(
    module_class: type[nn.Module], folder: Path, dtype: Any = jnp.float32
) -> tuple[nn.Module, ParamTree]:
    """Loads the one model in `folder`, built from its config.json.

    Raises:
        UserError: a file is missing, not supported or damaged. The message names it.
    """
    source = FolderSource(folder)
    config_class = module_class.__annotations__["config"]
    config = source.config("", config_class.from_dict)
    module = module_class(config, Execution(jnp.dtype(dtype)))
    return module, source.params("", abstract_params(module), dtype)


def abstract_params(module: nn.Module) -> ParamTree:
    """The parameters of a model of this package as `jax.ShapeDtypeStruct`s, allocating nothing."""
    # The shapes are the same however it is computed; over devices, one image could not be.
    module = module.clone(execution=_IN_FLOAT32)
    return jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]


def initial_params(module: nn.Module, seed: int) -> ParamTree:
    """Random parameters of a model of this package, to train it from."""
    inputs = [jnp.zeros(x.shape, x.dtype) for x in module.example_inputs()]
    return jax.jit(module.init)(jax.random.key(seed), *inputs)["params"]
