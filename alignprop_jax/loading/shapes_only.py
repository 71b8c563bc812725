"""Models known by the shapes of their weights, which costs neither memory nor a download."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from alignprop_jax.foreign_json import number, read_json_fields

# The configs of models in wide use, as their owners publish them.
_PUBLISHED = Path(__file__).parents[1] / "assets" / "published"
# Of CLIP's tokenizer.
_MAX_LENGTH = 77

_active = contextvars.ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Within, whatever loads weights gives their shapes instead, as `jax.ShapeDtypeStruct`s.

    What is computed from them at once, such as embedded prompts, is zeros (see `compute`); a model
    on the hub is known by its configs alone, and a published one without a network.
    """
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def active() -> bool:
    """Whether shapes stand for weights."""
    return _active.get()


def shapes(abstract: Any, dtype: Any) -> Any:
    """The tree of shapes as those of weights of that dtype."""
    return jax.tree.map(lambda leaf: leaf.update(dtype=dtype), abstract)


def compute(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns `function(*arguments)`, compiled; where an argument has shapes only, zeros."""
    leaves = jax.tree.leaves(arguments)
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.jit(function)(*arguments)
    results = jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), results)


def published_folder(repo: str) -> Path | None:
    """The folder of a hub repository's configs where they are part of the package."""
    folder = _PUBLISHED / repo
    return folder if folder.is_dir() else None


class _Tokens(NamedTuple):
    input_ids: Int[np.ndarray, "b l"]


class BlankTokenizer:
    """What stands for a tokenizer whose vocabulary is not at hand: every token is 0."""

    def __init__(self, folder: Path):
        file = folder / "tokenizer_config.json"
        # transformers writes 1e30 where it knows of no bound.
        schema = {"model_max_length": number(1, 1e30, default=_MAX_LENGTH)}
        length = read_json_fields(file, schema)["model_max_length"] if file.is_file() else 1e30
        self.model_max_length = int(min(length, _MAX_LENGTH))

    def get_vocab(self) -> dict[str, int]:
        """Of what the one token that it gives is called."""
        return {"": 0}

    def __call__(self, prompts: Sequence[str], **options: Any) -> _Tokens:
        return _Tokens(np.zeros((len(prompts), self.model_max_length), np.int64))
