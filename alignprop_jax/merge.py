"""Writes a whole diffusers folder with LoRA folded into its weights, for use without a LoRA file.

    python -m alignprop_jax.merge --model=M --lora=runs/aesthetic/lora --output=DIR

--lora A --lora B --mix 0.3 folds in 0.3 A + 0.7 B. Everything but the UNet, and the text encoders
that the LoRA adapts, is copied as it is, unless --dtype changes the type of all weights. Pickles
and other copies of weights that are changed are left out, where they stand beside safetensors: they
would be those of the source.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict

from alignprop_jax.errors import UserError, run_program
from alignprop_jax.generators.stable_diffusion.load import adaptable_shapes
from alignprop_jax.inputs.foreign_json import read_json_object
from alignprop_jax.loading.pretrained import resolve_model
from alignprop_jax.loading.tensor_files import read_metadata, read_safetensors, write_safetensors
from alignprop_jax.loading.weights import to_torch_layout
from alignprop_jax.lora.factors import LoraTree
from alignprop_jax.lora.mixing import LoraMix, define_lora_flags
from alignprop_jax.process import signals
from alignprop_jax.records.places import header_without_places, without_places

_SOURCE = "source"
_DTYPES = (_SOURCE, "float32", "float16", "bfloat16")
# Weights in formats that are not written here, and the indices of their shards.
_OTHER_WEIGHTS = (".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".pb", ".pt", ".pth")
# Parts that a pipeline works without; a download leaves them out.
_OPTIONAL = ("feature_extractor", "image_encoder", "safety_checker")
_NO_PART = [None, None]
# Keys under which diffusers and transformers write where something lay.
_PLACES = (
    "_name_or_path",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
)

# What is added to a weight, in torch's layout, by the part of the model and its name in the file.
Changes = Mapping[str, Mapping[str, np.ndarray]]


def merge(model: str, lora: LoraMix, output: Path, dtype: str = _SOURCE) -> None:
    """Writes the folder; it is there whole or not at all.

    Args:
        model: diffusers folder, hub id or "emoji".
        lora: what is folded in.
        output: a folder that is absent or empty.
        dtype: floating type of all weights, "source" for each as it is. The sums are made in
            float32; in half precision small changes round away.

    Raises:
        UserError: the model or the LoRA cannot be read, or the output is in use.
    """
    if lora.timesteps is not None:
        raise UserError("--lora_timesteps cannot be merged: weights are the same at all timesteps")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output} is there already; remove it, or give another")
    source = resolve_model(model)
    factors = lora.load(adaptable_shapes(source))
    if factors is None:
        raise UserError("there is nothing to merge; give --lora=FILE")
    changes = {part: _changes(tree) for part, tree in factors.items() if tree}
    files = list(_files_to_write(source, changes, dtype))
    try:
        with _whole_or_not_at_all(output) as partial:
            _write(source, files, partial, changes, dtype)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error.strerror})") from error


def _is_changed(file: Path, changes: Changes, dtype: str) -> bool:
    """Whether weights in this file, relative to the model's folder, are not those of the source."""
    return file.parts[0] in changes or (dtype != _SOURCE and len(file.parts) > 1)


def _files_to_write(source: Path, changes: Changes, dtype: str) -> Iterator[Path]:
    """The files of the model that belong to the merged one, relative to its folder."""
    # Links are followed: a part of a model may be that of another one.
    for folder, _, names in os.walk(source, followlinks=True):
        for file in (Path(folder, name).relative_to(source) for name in sorted(names)):
            weights = Path(re.sub(r"\.index(\.\w+)?\.json$", "", file.name))
            if weights.suffix not in _OTHER_WEIGHTS or not _is_changed(file, changes, dtype):
                yield file
            elif not any(name.endswith(".safetensors") for name in names):
                raise UserError(
                    f"{source / file}: weights that are changed must be safetensors; convert the "
                    "model with diffusers' save_pretrained first"
                )


@contextlib.contextmanager
def _whole_or_not_at_all(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` at the end and vanishes at an error."""
    output = output.resolve()
    partial = output.with_name(f"{output.name}.partial")
    if partial.exists():
        raise UserError(
            f"{partial} is there already, as a merge leaves it that is killed; remove it"
        )
    partial.mkdir(parents=True)
    signals.at_end(lambda: _remove(partial))
    try:
        yield partial
        if output.exists():
            output.rmdir()
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove(partial: Path) -> None:
    """Removes the folder while it is being filled, and not once it has become the output."""
    aside = partial.with_name(f"{partial.name}.removed")
    os.replace(partial, aside)
    shutil.rmtree(aside)


def _write(source: Path, files: list[Path], target: Path, changes: Changes, dtype: str) -> None:
    missing = {part: set(of_part) for part, of_part in changes.items()}
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        part = file.parts[0]
        if file.suffix == ".safetensors" and _is_changed(file, changes, dtype):
            tensors = dict(_merged(source / file, changes.get(part, {}), dtype))
            header = header_without_places(read_metadata(source / file))
            write_safetensors(tensors, target / file, header)
            missing.get(part, set()).difference_update(map(_current_name, tensors), tensors)
        elif file.name.endswith("config.json") or file.name == "model_index.json":
            _copy_config(source / file, target / file)
        else:
            shutil.copyfile(source / file, target / file)
    for part, names in missing.items():
        if names:
            raise UserError(f"{source / part}: no safetensors there have {min(names)}")
    _forget_absent_parts(target)


def _copy_config(source: Path, target: Path) -> None:
    """Copies a config; where it says from which folder it was loaded, it keeps the name alone."""
    config = read_json_object(source)
    shared = config | {key: without_places(config[key]) for key in _PLACES if key in config}
    if shared == config:
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(shared, indent=2) + "\n", encoding="utf-8")


def _changes(factors: LoraTree) -> dict[str, np.ndarray]:
    # By NumPy, because accelerators multiply float32 in less than its precision.
    flat = {keys: np.asarray(leaf) for keys, leaf in flatten_dict(factors).items()}
    return {
        ".".join([*keys[:-1], "weight"]): to_torch_layout(
            ("kernel",), leaf @ flat[*keys[:-1], "up"]
        )
        for keys, leaf in flat.items()
        if keys[-1] == "down"
    }


def _current_name(name: str) -> str:
    """That of a text tower's tensor, whose prefix transformers 5 leaves out of files."""
    return f"text_model.{name}"


def _merged(
    file: Path, changes: Mapping[str, np.ndarray], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in read_safetensors(file):
        stored = tensor.dtype if dtype == _SOURCE else jnp.dtype(dtype)
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            stored = tensor.dtype
        change = changes.get(name, changes.get(_current_name(name)))
        if change is not None:
            tensor = tensor.astype(np.float32) + change
        yield name, tensor.astype(stored)


def _forget_absent_parts(folder: Path) -> None:
    """Takes optional parts that are not there off the list by which diffusers loads a pipeline."""
    file = folder / "model_index.json"
    index = read_json_object(file) if file.exists() else {}
    absent = [part for part in _OPTIONAL if part in index and not (folder / part).is_dir()]
    if any(index[part] != _NO_PART for part in absent):
        index |= dict.fromkeys(absent, _NO_PART)
        file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str]) -> None:
    del argv
    merge(_MODEL.value, _read_lora(), Path(_OUTPUT.value), _DTYPE.value)
    print(f"merged into {_OUTPUT.value}")


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string("model", None, "diffusers folder, hub id or emoji", required=True)
    _OUTPUT = flags.DEFINE_string("output", None, "folder to write", required=True)
    _DTYPE = flags.DEFINE_enum("dtype", _SOURCE, _DTYPES, "floating type of all weights")
    _read_lora = define_lora_flags()
    run_program(main)
