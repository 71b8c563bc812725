"""What a run comes to: summary.json, and the line it ends with."""

import math
import resource
import sys

import numpy as np
from ml_collections import ConfigDict

from alignprop_jax.errors import one_line
from alignprop_jax.prompts.splits import TRAIN, UNSEEN
from alignprop_jax.records.metrics import Record
from alignprop_jax.records.workdir import Workdir


def summarize(
    config: ConfigDict, workdir: Workdir, seconds_compile: float, seconds_total: float
) -> Record:
    """Returns the content of summary.json."""
    rewards = {
        (record["split"], record["step"]): record.get("reward_mean")
        for record in workdir.evaluations.read()
    }
    steps = config.train.num_steps
    # ru_maxrss is in kilobytes, but on macOS in bytes.
    rss_unit = 1 if sys.platform == "darwin" else 1024
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * rss_unit
    return {
        "reward_before": rewards[TRAIN, 0],
        "reward_after": rewards[TRAIN, steps],
        "unseen_before": rewards[UNSEEN, 0],
        "unseen_after": rewards[UNSEEN, steps],
        "steps": steps,
        "reward_queries": steps * config.train.batch_size * (1 + config.gradient.renoise),
        "seconds_compile": seconds_compile,
        "seconds_per_step": _mean(seconds_of_steps(workdir)),
        "seconds_total": seconds_total,
        "peak_rss_gb": peak_rss / 1e9,
    }


def seconds_of_steps(workdir: Workdir) -> list[float]:
    """Returns the wall-clock time of every step on record, those before a resume too."""
    seconds = (record.get("step_seconds") for record in workdir.metrics.read())
    return [value for value in seconds if value is not None]


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def describe_result(workdir: Workdir) -> str:
    """Returns what a run ends with: what rose from what to what, and where things are."""
    summary = workdir.load_summary()

    def rise(split: str) -> str:
        before, after = summary.get(f"{split}_before"), summary.get(f"{split}_after")
        # A reward that is not finite is null in the file.
        return " -> ".join("nan" if value is None else f"{value:.3f}" for value in (before, after))

    judged = "".join(
        f"; {judge} {_in_its_unit(judge, before)} -> {_in_its_unit(judge, after)}"
        for judge, (before, after) in judgements(workdir, summary["steps"]).items()
    )
    return one_line(
        f"reward {rise('reward')} on the prompts trained on, {rise('unseen')} on unseen ones, "
        f"after {summary['steps']} steps{judged}; "
        f"pictures in {workdir.images}, "
        + (f"UNet in {workdir.unet}" if workdir.unet.exists() else f"LoRA in {workdir.lora}"),
        most=10_000,
    )


def _in_its_unit(judge: str, value: float) -> str:
    return f"{value:.2f}" if judge.endswith("_kb") else f"{value:.0%}"


def judgements(workdir: Workdir, num_steps: int) -> dict[str, tuple[float, float]]:
    """Returns what every judge said before and after, over the samples of all splits."""
    records = workdir.evaluations.read()
    names = dict.fromkeys(name for record in records for name in record)
    means = [
        name
        for name in names
        if name.endswith("_mean") and not name.startswith(("reward_", "reward/"))
    ]

    def over_splits(name: str, step: int) -> float:
        at_step = [record for record in records if record["step"] == step]
        # A judge may have no opinion on any prompt of a split.
        opinions = [
            (record[name], record["n"]) for record in at_step if record.get(name) is not None
        ]
        values, sizes = zip(*opinions, strict=True) if opinions else ((math.nan,), (1,))
        return float(np.average(values, weights=sizes))

    return {
        name.removesuffix("_mean"): (over_splits(name, 0), over_splits(name, num_steps))
        for name in means
    }
