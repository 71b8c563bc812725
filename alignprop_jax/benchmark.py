"""Times this package and TRL's AlignProp at the same work, in turn.

    python -m alignprop_jax.benchmark --model=FOLDER --output=benchmark.json \\
        --peer_python=.peer/bin/python

FOLDER is a Stable Diffusion pipeline. The peer needs an environment of its own, with trl==0.23.0,
diffusers==0.35.2 and PyTorch; without --peer_python this package is timed alone. Prints a table of
medians, and writes every number to the output. --curves=steps,images,pixels,rank times this
package alone, with one quantity after the other varied.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from alignprop_jax.config import MOST_GUIDANCE, MOST_IMAGES, MOST_STEPS
from alignprop_jax.errors import UserError, run_program
from alignprop_jax.generators.stable_diffusion.load import open_model
from alignprop_jax.generators.stable_diffusion.pipeline_defaults import read_unet
from alignprop_jax.inputs.flag_types import define_number
from alignprop_jax.nn.vae import VAEConfig
from alignprop_jax.process.children import run_child
from alignprop_jax.records.metrics import write_json
from alignprop_jax.timing.curves import QUANTITIES, describe_curves, measure_curves
from alignprop_jax.timing.work import Work

_PEER = Path(__file__).parent / "timing" / "trl_peer.py"
_OWN, _TRL = "alignprop_jax", "trl"
_OWN_COMMAND = (sys.executable, "-m", "alignprop_jax.timing.own")


def benchmark(works: Sequence[Work], rounds: int, peer_python: str = "") -> list[dict[str, Any]]:
    """Times every case, the package and the peer in turn, each time in a new process.

    Args:
        works: the cases.
        rounds: how often each is timed.
        peer_python: an interpreter with TRL; empty to leave it out.

    Returns:
        For each case its name, images, and by contender the medians "seconds", "images_per_second",
        "seconds_before" the first result and "peak_rss_gb", and the "all" seconds; where there is a
        peer "speedup", the median of the ratios of the rounds.

    Raises:
        UserError: a process fails.
    """
    commands = {_OWN: list(_OWN_COMMAND)}
    if peer_python:
        commands[_TRL] = [peer_python, str(_PEER)]
    results = []
    for work in works:
        timed: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                timed[name].append(_run([*command, *work.arguments()]))
        results.append(summarize(work, timed))
    return results


def _run(command: Sequence[str]) -> dict[str, Any]:
    # The peer's interpreter must not find this package's environment.
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    name = " ".join(command[:3])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    try:
        process = run_child(command, **pipes, env=environment)
    except OSError as error:
        raise UserError(f"{name} cannot be run ({error.strerror})") from error
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:]
        raise UserError(f"{name} failed: {''.join(last)}")
    try:
        return json.loads(process.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise UserError(f"{name} printed no result; is it Python with what it needs?") from error


def summarize(work: Work, timed: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The record of a case."""
    record: dict[str, Any] = {"case": work.name, "batch_size": work.batch_size}
    medians = {}
    for name, rounds in timed.items():
        per_round = [float(np.median(result["seconds"])) for result in rounds]
        medians[name] = np.array(per_round)
        record[name] = {
            "seconds": float(np.median(per_round)),
            "images_per_second": work.batch_size / float(np.median(per_round)),
            "seconds_before": float(np.median([r["seconds_before"] for r in rounds])),
            "peak_rss_gb": float(np.median([r["peak_rss_gb"] for r in rounds])),
            "all": [result["seconds"] for result in rounds],
        }
    if _TRL in medians:
        record["speedup"] = float(np.median(medians[_TRL] / medians[_OWN]))
    return record


def describe(results: Sequence[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    contenders = [name for name in (_OWN, _TRL) if name in results[0]]
    titles = ["case"]
    for name in contenders:
        titles += [f"{name}: s", "images/s", "GB", "s before"]
    titles += ["speedup"] if _TRL in contenders else []
    rows = [titles, ["---"] * len(titles)]
    for record in results:
        row = [f"{record['case']}, batch {record['batch_size']}"]
        for name in contenders:
            timed = record[name]
            row += [f"{timed[key]:.2f}" for key in ("seconds", "images_per_second", "peak_rss_gb")]
            row.append(f"{timed['seconds_before']:.0f}")
        row += [f"{record['speedup']:.2f}"] if _TRL in contenders else []
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def time_own(work: Work) -> float:
    """The median seconds of this package, in a process of its own."""
    return float(np.median(_run([*_OWN_COMMAND, *work.arguments()])["seconds"]))


def edge_of(model: str) -> int:
    """Pixels of an edge of a model's images."""
    source = open_model(model)
    read = functools.partial(read_unet, is_xl=source.has("text_encoder_2"))
    sample_size = source.config("unet", read).sample_size
    return sample_size * source.config("vae", VAEConfig.from_dict).downscale


def first_step(case: str, num_steps: int) -> int | None:
    """What an item of --cases stands for; None for sampling alone."""
    if case == "sample":
        return None
    if not re.fullmatch("[0-9]{1,5}", case) or int(case) > num_steps:
        raise UserError(f"--cases={case}: give sample, or a first step of 0 to {num_steps}")
    return int(case)


def main(argv: list[str]) -> None:
    del argv
    output = Path(_OUTPUT.value)
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output={output} must be a file, in a folder that is there")

    def work(start: int | None) -> Work:
        sizes = (_BATCH_SIZE.value, _NUM_STEPS.value, _GUIDANCE_SCALE.value, _REPEATS.value)
        return Work(_MODEL.value, start, *sizes)

    if _CURVES.value:
        curves = measure_curves(_CURVES.value, work(0), edge_of(_MODEL.value), time_own)
        write_json(output, {"curves": curves})
        print(describe_curves(curves))
        return
    works = [work(first_step(case, _NUM_STEPS.value)) for case in _CASES.value]
    results = benchmark(works, _ROUNDS.value, _PEER_PYTHON.value)
    write_json(output, {"results": results})
    print(describe(results))


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string("model", None, "a pipeline folder", required=True)
    _OUTPUT = flags.DEFINE_string("output", "benchmark.json", "file for every number")
    _PEER_PYTHON = flags.DEFINE_string("peer_python", "", "an interpreter that has TRL 0.23")
    _CASES = flags.DEFINE_list(
        "cases", ["0", "10", "19", "sample"], "first steps with gradient of updates, or sample"
    )
    flags.register_validator("cases", bool, "one at least")
    _CURVES = flags.DEFINE_list("curves", [], f"quantities to vary, of {', '.join(QUANTITIES)}")
    flags.register_validator(
        "curves", lambda names: set(names) <= set(QUANTITIES), f"one of {', '.join(QUANTITIES)}"
    )
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "images", 1, MOST_IMAGES)
    _NUM_STEPS = flags.DEFINE_integer("num_steps", 20, "denoising steps", 1, MOST_STEPS)
    _GUIDANCE_SCALE = define_number(
        "guidance_scale", 5.0, "of classifier-free guidance", 1, MOST_GUIDANCE
    )
    _REPEATS = flags.DEFINE_integer("repeats", 3, "times in each process", 1, 1000)
    _ROUNDS = flags.DEFINE_integer("rounds", 3, "processes of each, in turn", 1, 1000)
    run_program(main)
