"""Compares methods on several rewards and seeds under one budget of reward queries.

    python -m alignprop_jax.compare --workdir=runs/comparison \\
        --rewards=aesthetic,jpeg_compress,count --seeds=3 --queries=672

--method, which may be repeated, is an algorithm and settings that differ from the config's,
"ddpo train.learning_rate=1e-3", or the name of an ablation: k1, k10, random, full. By default all
algorithms are compared. Every run is one of `train`, in DIR/runs; the same command goes on where
it was interrupted. DIR/comparison.json gets the numbers, DIR/comparison.html, a page on its own,
curves and pictures; docs/comparison.md tells what each is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from alignprop_jax.config import MOST_IMAGES, MOST_STEPS, MOST_TIMES
from alignprop_jax.errors import UserError, run_program
from alignprop_jax.pages.comparison import write_page
from alignprop_jax.records.lock import locked
from alignprop_jax.records.metrics import write_json
from alignprop_jax.trials.methods import DEFAULT_METHODS, Method
from alignprop_jax.trials.results import gather, table
from alignprop_jax.trials.runs import Budget, Run, plan_runs


def compare(
    workdir: Path,
    config_file: str,
    rewards: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    budget: Budget,
) -> str:
    """Trains what is not trained yet, writes results after every run and returns the table.

    Args:
        config_file: whose variants `rewards` names.
        methods: as `Method.parse` reads them.

    Raises:
        UserError: a method, a reward or a setting is unknown, a run fails, one that is there has
            other settings, or another process works in the folder.
    """
    parsed = [Method.parse(text) for text in methods]
    if len({method.folder for method in parsed}) < len(parsed):
        raise UserError(f"--method is given twice: {', '.join(methods)}")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written ({error.strerror})") from error
    runs = plan_runs(workdir, config_file, rewards, parsed, seeds, budget)
    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir):
        for run in runs:
            run.check()
        for number, run in enumerate(runs, start=1):
            if not run.is_finished():
                print(f"run {number} of {len(runs)}: {run.path}", flush=True)
                run.train()
                _write(workdir, runs)
        return table(_write(workdir, runs))


def _write(workdir: Path, runs: Sequence[Run]) -> dict[str, Any]:
    results = gather(runs)
    write_json(workdir / "comparison.json", results)
    write_page(workdir / "comparison.html", results, runs)
    return results


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of the comparison", required=True)
    _CONFIG_FILE = flags.DEFINE_string("config", "configs/emoji.py", "config file")
    _REWARDS = flags.DEFINE_list(
        "rewards", ["aesthetic", "jpeg_compress", "count"], "variants of the config file"
    )
    flags.register_validator("rewards", bool, "one at least")
    _METHODS = flags.DEFINE_multi_string(
        "method", list(DEFAULT_METHODS), "ALGORITHM [KEY=VALUE ...]; may be repeated"
    )
    _SEEDS = flags.DEFINE_integer("seeds", 3, "of each method on each reward", 1, 1000)
    _QUERIES = flags.DEFINE_integer("queries", 672, "of the reward, of a run", 1, MOST_TIMES)
    _EVALUATIONS = flags.DEFINE_integer(
        "evaluations", 6, "after the first, of a run", 1, MOST_STEPS
    )
    _SAMPLES = flags.DEFINE_integer(
        "samples_per_prompt",
        None,
        "of an evaluation, at most; by default the variant's",
        1,
        MOST_IMAGES,
    )
    run_program(
        lambda argv: print(
            compare(
                Path(_WORKDIR.value),
                _CONFIG_FILE.value,
                _REWARDS.value,
                _METHODS.value,
                _SEEDS.value,
                Budget(_QUERIES.value, _EVALUATIONS.value, _SAMPLES.value),
            )
        )
    )
