"""Judges of generated emoji that no reward knows: what is in it, how many, and in which style.

Networks trained on real emoji alone (`pretraining/train_judges.py`): small convolutional ones, and
a CLIP of its own for agreement with the prompt. They share neither weights nor seed with what
rewards come from, the convolutional ones not even the architecture, so that a picture which pleases
the reward without having become what it should does not pass here.
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
from jaxtyping import Array, Bool, Float, PyTree

from alignprop_jax.errors import UserError
from alignprop_jax.loading.pretrained import load_component, resolve_model
from alignprop_jax.loading.weights import ParamTree, load_params, save_params
from alignprop_jax.models.clip import CLIPModel
from alignprop_jax.prompts.english import plural
from alignprop_jax.prompts.objects import PromptObject, prompt_objects
from alignprop_jax.rewards.base import Reward
from alignprop_jax.rewards.clip_similarity import make_clip_score_reward
from alignprop_jax.rewards.preprocess import CLIPPreprocessor, crop_middle, resize_shorter_edge

# Images [B, H, W, 3] float32 in [0, 1] and their prompts in, scores [B] out.
Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]

IMAGE_SIZE = 64
NOTHING = "nothing"
"""The class of washes, gradients, blurs and noise, where no object is."""
COUNTS = (NOTHING, "one", "two", "three", "four")
"""The classes of the judge of numbers."""


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

    def save(self, folder: Path, name: str) -> "Judge":
        """Writes `NAME.safetensors`; returns the judge as users will have it, in half precision."""
        save_params(self.params, folder / f"{name}.safetensors", np.float16)
        params = jax.tree.map(lambda x: x.astype(jnp.float16).astype(x.dtype), self.params)
        return Judge(self.classes, params)

    def classify(self, images: Float[np.ndarray, "b h w 3"]) -> list[str]:
        """The most likely class of each image in [0, 1]."""
        indices = np.asarray(_logits(len(self.classes), self.params, images)).argmax(-1)
        return [self.classes[index] for index in indices]

    def find(self, images: Float[np.ndarray, "b h w 3"]) -> Bool[np.ndarray, "b n"]:
        """Which classes are in each image in [0, 1], of a judge of several at once."""
        return np.asarray(_logits(len(self.classes), self.params, images)) > 0


@partial(jax.jit, static_argnums=0)
def _logits(
    num_classes: int, params: ParamTree, images: Float[Array, "b h w 3"]
) -> Float[Array, "b n"]:
    images = crop_middle(resize_shorter_edge(images, IMAGE_SIZE), IMAGE_SIZE)
    return ConvClassifier(num_classes).apply({"params": params}, images)


def find_judges(model: str | Path, prompts: Sequence[str] = ()) -> dict[str, Scorer]:
    """Loads the judges in the folder `judges` of a model; none where it has no such folder.

    Args:
        prompts: as for `load_judges`.

    Raises:
        UserError: as `load_judges` and `pretrained.resolve_model`.
    """
    folder = resolve_model(model) / "judges"
    return load_judges(folder, prompts) if folder.is_dir() else {}


def load_judges(folder: str | Path, prompts: Sequence[str] = ()) -> dict[str, Scorer]:
    """Loads the judges as scorers of images [B, H, W, 3] in [0, 1] and their B prompts.

    Args:
        prompts: those that are known before, made ready together.

    Returns:
        All float32 [B], with NaN for prompts that a judge has no opinion on:
        "recognized": 1 where the one animal that the prompt names is in the image, 0 where not;
        "glossy": 1 where the image is glossy 3D art, 0 where not;
        "counted": 1 where the image shows as many objects, one to four, as the prompt says;
        "found": of the animals that a prompt on several objects names, the share that is there;
        "agreement": the cosine of image and prompt by a CLIP of another seed than any reward's;
        and float32 [B, D] "diversity", that CLIP's embeddings of the images.

    Raises:
        UserError: a file is missing or damaged.
    """
    recognizer, style = Judge.load(folder, "recognizer"), Judge.load(folder, "style")
    counter, finder = Judge.load(folder, "counter"), Judge.load(folder, "finder")
    known = frozenset(recognizer.classes) - {NOTHING}

    def recognized(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        wanted = [_only_name(prompt, known) for prompt in prompts]
        return _equal(recognizer.classify(images), wanted)

    def glossy(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return np.array([found == "glossy" for found in style.classify(images)], np.float32)

    def counted(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return _equal(counter.classify(images), [_count_class(prompt) for prompt in prompts])

    def animals(prompt: str) -> list[str]:
        things = prompt_objects(prompt)
        several = len(things) > 1 or any(thing.number != 1 for thing in things)
        return _animals(things, finder.classes) if several else []

    found = share_found(finder, animals)
    return {
        "recognized": recognized,
        "glossy": glossy,
        "counted": counted,
        "found": found,
        "agreement": reward_scorer(make_clip_score_reward(str(Path(folder) / "clip")), prompts),
        "diversity": _embedding_scorer(Path(folder) / "clip"),
    }


def removal_judges(folder: str | Path, concept: str) -> dict[str, Scorer]:
    """What `load_judges` finds in images whose prompts' `concept` is to vanish.

    Returns:
        "concept_found": 1 where the concept is in the image; "rest_found": of the prompt's other
        animals, the share that is there. Empty for a concept that the judge does not know.
    """
    finder = Judge.load(folder, "finder")
    if concept not in finder.classes:
        return {}

    def rest(prompt: str) -> list[str]:
        animals = _animals(prompt_objects(prompt), finder.classes)
        return [animal for animal in animals if animal != concept]

    return {
        "concept_found": share_found(finder, lambda prompt: [concept]),
        "rest_found": share_found(finder, rest),
    }


def share_found(finder: Judge, wanted: Callable[[str], Sequence[str]]) -> Scorer:
    """A scorer: of the classes that `wanted` says a prompt asks for, the share that is there."""

    def score(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        scores = []
        for prompt, seen in zip(prompts, finder.find(images), strict=True):
            there = [seen[finder.classes.index(name)] for name in wanted(prompt)]
            scores.append(np.mean(there) if there else np.nan)
        return np.array(scores, np.float32)

    return score


def reward_scorer(reward: Reward, prompts: Sequence[str] = ()) -> Scorer:
    """A reward as a scorer; what it makes of a prompt is kept.

    Args:
        prompts: those that are known before, made ready together.
    """
    score = jax.jit(reward.score)
    prepared: dict[str, PyTree] = {}

    def prepare(prompts: Sequence[str]) -> None:
        new = sorted(set(prompts) - prepared.keys())
        if new:
            inputs = reward.prepare(new)
            for row, prompt in enumerate(new):
                prepared[prompt] = jax.tree.map(lambda x, row=row: np.asarray(x)[row], inputs)

    prepare(prompts)

    def scorer(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        prepare(prompts)
        inputs = jax.tree.map(lambda *rows: np.stack(rows), *(prepared[p] for p in prompts))
        return np.asarray(score(reward.params, images, inputs))

    return scorer


def _embedding_scorer(clip: Path) -> Scorer:
    model, params = load_component(CLIPModel, clip)
    preprocess = CLIPPreprocessor.from_folder(clip, model.config.vision.image_size)

    @jax.jit
    def embed(params, images):
        return model.apply({"params": params}, preprocess(images), method="get_image_features")

    return lambda images, prompts: np.asarray(embed(params, images))


def _equal(seen: Sequence[str], wanted: Sequence[str | None]) -> Float[np.ndarray, " b"]:
    scores = [
        np.nan if name is None else name == found for found, name in zip(seen, wanted, strict=True)
    ]
    return np.array(scores, np.float32)


def _count_class(prompt: str) -> str | None:
    numbers = [thing.number for thing in prompt_objects(prompt)]
    if not numbers or None in numbers or sum(numbers) >= len(COUNTS):
        return None
    return COUNTS[sum(numbers)]


def _animals(things: Sequence[PromptObject], known: Sequence[str]) -> list[str]:
    """Which of the known animals the objects of a prompt are, one or several of each."""
    names = {form: name for name in known for form in (name, plural(name))}
    found = [names.get(thing.name.split()[-1]) for thing in things]
    return [name for name in found if name]


def _only_name(prompt: str, known: frozenset[str]) -> str | None:
    found = known.intersection(re.findall(r"[a-z]+", prompt.lower()))
    return next(iter(found)) if len(found) == 1 else None
