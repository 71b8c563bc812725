"""The web page of a sweep: one file, of its own template, with data and pictures inside."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from etils import epath
from PIL import Image

from alignprop_jax.devices.distributed import on_main
from alignprop_jax.lora.files import LORA_FILE
from alignprop_jax.records.metrics import Record, write_atomically
from alignprop_jax.records.places import name_of, score_name

MOST_PICTURES = 8
_LARGEST = 160  # pixels across a picture: hundreds of them make one page
_TEMPLATE = resources.files("alignprop_jax") / "assets" / "sweep.html"
_PLACEHOLDER = '"SWEEP"'


@on_main
def write_page(
    path: Path | epath.Path,
    records: Sequence[Record],
    pictures: Sequence[np.ndarray],
    *,
    prompts: Sequence[str],
    files: Sequence[str],
    model: str,
    weights: Mapping[str, float],
    num_timesteps: int,
) -> None:
    """Writes the page.

    Args:
        path: of the page.
        records: of every range of timesteps, one after the other, those of every alpha, with the
            same alphas: mix, lora_timesteps, n and NAME_mean of every score.
        pictures: bytes [P, H, W, 3] for each record: the same noise for the first P prompts.
        prompts: at least P.
        files: the LoRA files, A and perhaps B.
        model: the base model.
        weights: of the parts of the reward.
        num_timesteps: of the diffusion process.
    """
    summed = [f"{weight:g} {_label(name)}" for name, weight in weights.items() if weight]
    is_sum = len(summed) > 1
    parts = [f"reward/{name}" for name in weights]
    scored = [name.removesuffix("_mean") for name in records[0] if name.endswith("_mean")]
    judges = [name for name in scored if name != "reward" and name not in parts]
    # A sum of one part says nothing new.
    names = [*(["reward"] if is_sum else []), *parts, *judges]
    data = {
        "model": name_of(model),
        "loras": [{"name": lora_name(file)} for file in files],
        "prompts": prompts[: len(pictures[0])],
        "numTimesteps": num_timesteps,
        "numSamples": records[0]["n"],
        "scores": [{"name": score_name(name), "label": _label(name)} for name in names],
        "sum": " + ".join(summed) if is_sum else None,
        "points": [
            {
                "alpha": record["mix"],
                "timesteps": record["lora_timesteps"],
                "means": [record[f"{name}_mean"] for name in names],
                "pictures": [_data_uri(image) for image in images],
            }
            for record, images in zip(records, pictures, strict=True)
        ],
    }
    # A prompt may hold what ends a script.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    write_atomically(path, _TEMPLATE.read_text(encoding="utf-8").replace(_PLACEHOLDER, text))


def lora_name(file: str) -> str:
    """Returns how the page calls a LoRA: its file, or the run's folder, where all are named alike.

    "runs/glossy/lora/pytorch_lora_weights.safetensors" is "glossy".
    """
    path = Path(file)
    for name in (LORA_FILE, "lora"):
        # The name of a home directory is its owner's.
        if path.name == name and path.parent.name and path.parent != Path.home():
            path = path.parent
    return path.name.removesuffix(".safetensors")


def _label(score: str) -> str:
    """ "redness" for "reward/path/to/rewards.py:redness"."""
    return score.rsplit("/", 1)[-1].rsplit(".py:", 1)[-1]


def _data_uri(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    if picture.width > _LARGEST:
        height = max(1, round(picture.height * _LARGEST / picture.width))
        picture = picture.resize((_LARGEST, height), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=85, method=6)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")
