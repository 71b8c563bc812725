"""Judges of generated emoji that no reward knows: what is in the picture, and in which style.

Two small convolutional networks trained on real emoji alone (`pretraining/train_judges.py`). They
share neither architecture, weights nor seed with the CLIP that rewards come from, so that a picture
which pleases the reward without having become what it should does not pass here.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignprop_jax.errors import UserError
from alignprop_jax.pretrained import resolve_model
from alignprop_jax.rewards.preprocess import crop_middle, resize_shorter_edge
from alignprop_jax.weights import ParamTree, load_params

# Images [B, H, W, 3] float32 in [0, 1] and their prompts in, scores [B] out.
Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]

IMAGE_SIZE = 64
NOTHING = "nothing"
"""The class of washes, gradients, blurs and noise, where no object is."""


class ConvClassifier(nn.Module):
    """Stages of smaller and deeper pictures, an average over the last, and a linear layer.

    A stage moves neighbouring pixels into the channels, 4x4 at first and 2x2 then, mixes them, and
    convolves 3x3: trained on a CPU, that is several times as fast as strided convolutions are.

    Attributes:
        num_classes: width of the output.
        widths: channels at a quarter, an eighth, ... of the input's edge.
    """

    num_classes: int
    widths: tuple[int, ...] = (32, 64, 128)

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n"]:
        """The logits of images in [0, 1]."""
        x = 2 * images - 1
        for stage, width in enumerate(self.widths):
            x = _blocks_to_channels(x, edge=2 if stage else 4)
            x = nn.Dense(width, name=f"stages.{stage}.mix")(x)
            x = nn.silu(nn.GroupNorm(8, name=f"stages.{stage}.mix_norm")(x))
            x = nn.Conv(width, (3, 3), name=f"stages.{stage}.conv")(x)
            x = nn.silu(nn.GroupNorm(8, name=f"stages.{stage}.conv_norm")(x))
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))

    def abstract_params(self) -> ParamTree:
        """The shapes of its parameters."""
        images = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
        return jax.eval_shape(self.init, jax.random.key(0), images)["params"]


def _blocks_to_channels(x: Float[Array, "b h w c"], edge: int) -> Float[Array, "b h/e w/e e*e*c"]:
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // edge, edge, width // edge, edge, channels).swapaxes(2, 3)
    return x.reshape(batch, height // edge, width // edge, edge * edge * channels)


@dataclasses.dataclass(frozen=True)
class Judge:
    """A trained classifier."""

    classes: tuple[str, ...]
    params: ParamTree

    @classmethod
    def load(cls, folder: str | Path, name: str) -> "Judge":
        """Reads `config.json` and `NAME.safetensors`.

        Raises:
            UserError: a file is missing or damaged.
        """
        path = Path(folder) / "config.json"
        try:
            classes = tuple(json.loads(path.read_text(encoding="utf-8"))[name]["classes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read as the config of judges ({error!r})"
            ) from error
        abstract = ConvClassifier(len(classes)).abstract_params()
        return cls(classes, load_params(abstract, Path(folder) / f"{name}.safetensors"))

    def classify(self, images: Float[np.ndarray, "b h w 3"]) -> list[str]:
        """The most likely class of each image in [0, 1]."""
        indices = _classify(len(self.classes), self.params, images)
        return [self.classes[index] for index in np.asarray(indices)]


@partial(jax.jit, static_argnums=0)
def _classify(num_classes: int, params: ParamTree, images: Float[Array, "b h w 3"]) -> Array:
    images = crop_middle(resize_shorter_edge(images, IMAGE_SIZE), IMAGE_SIZE)
    return ConvClassifier(num_classes).apply({"params": params}, images).argmax(-1)


def find_judges(model: str | Path) -> dict[str, Scorer]:
    """Loads the judges in the folder `judges` of a model; none where it has no such folder.

    Raises:
        UserError: as `load_judges` and `pretrained.resolve_model`.
    """
    folder = resolve_model(model) / "judges"
    return load_judges(folder) if folder.is_dir() else {}


def load_judges(folder: str | Path) -> dict[str, Scorer]:
    """Loads both judges as scorers of images [B, H, W, 3] in [0, 1] and their B prompts.

    Returns:
        "recognized": 1 where the animal that the prompt names is in the image, 0 where not, NaN for
        prompts that name none or several of the animals it knows; "glossy": 1 where the image is
        glossy 3D art, 0 where not. Both float32 [B].

    Raises:
        UserError: a file is missing or damaged.
    """
    recognizer, style = Judge.load(folder, "recognizer"), Judge.load(folder, "style")
    known = frozenset(recognizer.classes) - {NOTHING}

    def recognized(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        wanted = [_only_name(prompt, known) for prompt in prompts]
        seen = recognizer.classify(images)
        scores = [
            np.nan if name is None else name == found
            for name, found in zip(wanted, seen, strict=True)
        ]
        return np.array(scores, np.float32)

    def glossy(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return np.array([found == "glossy" for found in style.classify(images)], np.float32)

    return {"recognized": recognized, "glossy": glossy}


def _only_name(prompt: str, known: frozenset[str]) -> str | None:
    found = known.intersection(re.findall(r"[a-z]+", prompt.lower()))
    return next(iter(found)) if len(found) == 1 else None
