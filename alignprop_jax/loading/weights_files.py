"""What diffusers and transformers call the files of a model's weights."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

SAFETENSORS, PICKLES = ".safetensors", ".bin"

_STEMS = {
    SAFETENSORS: ("diffusion_pytorch_model", "model"),
    PICKLES: ("diffusion_pytorch_model", "pytorch_model"),
}


def find_weights(folder: Path, variant: str | None = None) -> Path | None:
    """The file of weights in `folder`, whole or the index of its shards; None if there is none.

    Args:
        folder: of one model.
        variant: such as fp16, as in model.fp16.safetensors. None: weights of no variant if there
            are any, otherwise fp16; safetensors before pickles.
    """
    for kind in _STEMS:
        for mark in (variant,) if variant else (None, "fp16"):
            for name in _names(kind, mark):
                if os.path.isfile(folder / name):
                    return folder / name
    return None


def weights_patterns(folders: Sequence[str], kind: str, variant: str | None) -> list[str]:
    """Globs of all files of the weights of a variant, shards included, in any of the folders."""
    mark = _mark(variant)
    return [
        f"{folder}{name}"
        for folder in folders
        for name in (
            *_names(kind, variant),
            *(f"{stem}{mark}-?????-of-?????{kind}" for stem in _STEMS[kind]),
            # Older releases put the variant behind the number.
            *(f"{stem}-?????-of-?????{mark}{kind}" for stem in _STEMS[kind] if variant),
        )
    ]


def _names(kind: str, variant: str | None) -> Iterator[str]:
    mark = _mark(variant)
    for stem in _STEMS[kind]:
        yield f"{stem}{mark}{kind}"
        yield f"{stem}{kind}.index{mark}.json"


def _mark(variant: str | None) -> str:
    return f".{variant}" if variant else ""
