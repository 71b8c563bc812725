"""The web page of a comparison: one file, of its own template, with data and pictures inside."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from alignprop_jax.errors import note
from alignprop_jax.records.metrics import write_atomically
from alignprop_jax.records.places import name_of
from alignprop_jax.runs.experiment import TRAIN, UNSEEN
from alignprop_jax.trials.runs import Run

_LARGEST = 720  # pixels of a grid's longer edge
_TEMPLATE = resources.files("alignprop_jax") / "assets" / "comparison.html"
_PLACEHOLDER = '"COMPARISON"'


def write_page(path: Path, results: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Writes the page.

    Args:
        results: from `results.gather`.
        runs: they are of; the grids are those of each method's first finished one.
    """
    data = {**results, "pictures": _pictures(runs), "model": name_of(runs[0].config.model)}
    # The name of a method may hold what ends a script.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    write_atomically(path, _TEMPLATE.read_text(encoding="utf-8").replace(_PLACEHOLDER, text))


def _pictures(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, str]]]:
    """Grids by reward, by method and by split; "before" stands for a method, too."""
    pictures: dict[str, dict[str, dict[str, str]]] = {}
    for run in runs:
        grids = pictures.setdefault(run.reward, {})
        if run.is_finished() and run.method.name not in grids:
            for method, when in (("before", "before"), (run.method.name, "after")):
                grids.setdefault(
                    method,
                    {
                        split: _data_uri(run.path / "images" / f"{split}_{when}.png")
                        for split in (TRAIN, UNSEEN)
                    },
                )
    return pictures


def _data_uri(file: Path) -> str:
    try:
        picture = Image.open(file).convert("RGB")
    except OSError as error:
        note(f"{file} cannot be read ({type(error).__name__}); the page shows nothing in its place")
        picture = Image.new("RGB", (64, 64), "white")
    picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=70, method=6)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")
