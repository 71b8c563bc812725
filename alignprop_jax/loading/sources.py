"""Where the parts of a model come from: a folder of diffusers or of transformers."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from alignprop_jax.errors import UserError, note
from alignprop_jax.foreign_json import read_json_object
from alignprop_jax.loading import shapes_only
from alignprop_jax.loading.tokenizer import load_tokenizer
from alignprop_jax.loading.torch_file import EXTRA
from alignprop_jax.loading.weights import ParamTree, load_params
from alignprop_jax.loading.weights_files import find_weights
from alignprop_jax.models.clip import CLIPTextConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


# The configs that are no config.json in the component's folder.
_CONFIG_FILES = {"scheduler": "scheduler/scheduler_config.json", "model_index": "model_index.json"}


class ModelSource(Protocol):
    """A pipeline's parts by the names of their folders in diffusers' layout.

    Every other method raises UserError, naming the file, where the part is missing, damaged or not
    as asked for.
    """

    def has(self, component: str) -> bool:
        """Whether there is such a part."""

    def config(self, component: str, parse: Callable[[Mapping[str, Any]], T]) -> T:
        """What `parse` makes of the config of "unet", "scheduler", "model_index" and so on.

        Args:
            component: the part's name.
            parse: reads the config of diffusers or transformers; its KeyErrors and UserErrors are
                reported with the name of the file.
        """

    def params(self, component: str, abstract: ParamTree, dtype: Any) -> ParamTree:
        """The weights of a part, as `weights.load_params` returns them."""

    def tokenizer(self, component: str = "tokenizer") -> "PreTrainedTokenizerBase":
        """A tokenizer of CLIP."""


class FolderSource:
    """A pipeline in diffusers' layout; or a model alone, whose component is called ""."""

    def __init__(self, folder: Path, variant: str | None = None):
        """See `weights_files.find_weights` for the variant.

        A part that has no weights of the variant is read without it if another part has some.
        """
        self._folder = folder
        self._variant = variant

    def __str__(self) -> str:
        return str(self._folder)

    def has(self, component: str) -> bool:
        return os.path.exists(self._folder / _CONFIG_FILES.get(component, component))

    def config(self, component: str, parse: Callable[[Mapping[str, Any]], T]) -> T:
        file = self._folder / _CONFIG_FILES.get(component, Path(component, "config.json"))
        folder = file.parent
        if not os.path.isdir(folder):
            raise UserError(f"{folder.parent}: no folder {folder.name}, so not a whole model")
        return parse_config(read_json_object(file), parse, file)

    def params(self, component: str, abstract: ParamTree, dtype: Any) -> ParamTree:
        if shapes_only.active():
            return shapes_only.shapes(abstract, dtype)
        folder = self._folder / component
        file = find_weights(folder, self._variant)
        if file is None and self._has_variant():
            file = find_weights(folder)
            if file is not None:
                note(f"{folder}: no weights of the variant {self._variant}; {file.name} is read")
        if file is None:
            variant = f" of the variant {self._variant}" if self._variant else ""
            raise UserError(
                f"{folder}: no weights{variant}; a file diffusion_pytorch_model.safetensors or "
                f"model.safetensors is needed, or with PyTorch ({EXTRA}) a .bin"
            )
        return load_params(abstract, file, dtype)

    def tokenizer(self, component: str = "tokenizer") -> "PreTrainedTokenizerBase":
        encoder = component.replace("tokenizer", "text_encoder")
        return load_tokenizer(
            self._folder / component, self.config(encoder, CLIPTextConfig.from_dict)
        )

    def _has_variant(self) -> bool:
        """Whether any part has weights of the variant that was asked for."""
        return bool(self._variant) and any(
            find_weights(part, self._variant) for part in self._folder.glob("*")
        )


def parse_config(
    config: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], T], origin: str | Path
) -> T:
    """Returns `parse(config)`; its KeyErrors and UserErrors are reported with the origin."""
    try:
        return parse(config)
    except KeyError as error:
        raise UserError(f"{origin}: lacks the key {error}") from error
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
