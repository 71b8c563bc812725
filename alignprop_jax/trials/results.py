"""What the runs of a comparison come to: curves over seeds, and the numbers of the table."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignprop_jax.errors import UserError
from alignprop_jax.records.metrics import Record
from alignprop_jax.records.places import score_name
from alignprop_jax.records.summary import seconds_of_steps
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.runs.experiment import TRAIN, UNSEEN
from alignprop_jax.trials.runs import Run

BASELINE = "ddpo"
"""The method whose best reward the others are timed to."""


def gather(runs: Sequence[Run], baseline: str = BASELINE) -> dict[str, Any]:
    """Collects the finished runs.

    Returns:
        By reward and method: "queries" and "seconds" of training at each evaluation; by split and
        score, "mean", "std", "low" and "high" over the seeds at each, and "final" and "best" of the
        reward; "queries_to_baseline", "speedup" (how many times fewer queries than the baseline
        needs to its best mean reward on the prompts trained on; None where it is never reached),
        seconds_per_step and peak_rss_gb, which are None where a summary has none, and the number
        of seeds. Seconds leave out compilation and
        evaluation.
    """
    grouped: dict[str, dict[str, list[Run]]] = collections.defaultdict(dict)
    for run in runs:
        grouped[run.reward].setdefault(run.method.name, []).append(run)
    results = {}
    for reward, methods in grouped.items():
        curves = {}
        for name, seeds in methods.items():
            finished = [run for run in seeds if run.is_finished()]
            if finished:
                curves[name] = _curves_of_method(finished)
        if baseline in curves:
            _compare_with(curves, baseline)
        results[reward] = curves
    return {"baseline": baseline, "rewards": results}


def _curves_of_method(runs: Sequence[Run]) -> dict[str, Any]:
    evaluations = [_evaluations_of(run) for run in runs]
    # A run that had another budget at first was evaluated at other steps.
    steps = sorted(set.intersection(*(set(by_step) for by_step in evaluations)))
    per_seed = [_curves_of_run(*pair, steps) for pair in zip(runs, evaluations, strict=True)]
    summaries = [Workdir(run.path).load_summary() or {} for run in runs]
    result: dict[str, Any] = {
        "seeds": len(runs),
        "queries": [step * runs[0].queries_per_step for step in steps],
        "seconds": np.mean([curve["seconds"] for curve in per_seed], 0).tolist(),
        "seconds_per_step": _number(np.mean(_known(summaries, "seconds_per_step"))),
        "peak_rss_gb": _number(np.max(_known(summaries, "peak_rss_gb"))),
    }
    for split in (TRAIN, UNSEEN):
        scores = per_seed[0][split]
        result[split] = {
            name: spread_over_seeds([curve[split][name] for curve in per_seed])
            for name in scores
            if all(name in curve[split] for curve in per_seed)
        }
    return result


def _known(summaries: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """What the summaries say; NaN where they say nothing."""
    return [np.nan if s.get(name) is None else s[name] for s in summaries]


def _evaluations_of(run: Run) -> dict[int, dict[str, Record]]:
    """By step, and by split, what a run has on record of both."""
    by_step: dict[int, dict[str, Record]] = collections.defaultdict(dict)
    for record in Workdir(run.path).evaluations.read():
        by_step[record["step"]][record["split"]] = record
    whole = {step: splits for step, splits in by_step.items() if splits.keys() >= {TRAIN, UNSEEN}}
    lacking = {0, run.config.train.num_steps} - whole.keys()
    if lacking:
        raise UserError(
            f"{run.path / 'eval.jsonl'} has no evaluation of step {min(lacking)}; remove "
            f"{run.path}, and the same command trains that run again"
        )
    return whole


def _curves_of_run(
    run: Run, evaluations: Mapping[int, Mapping[str, Record]], steps: Sequence[int]
) -> dict[str, Any]:
    seconds = seconds_of_steps(Workdir(run.path))
    if len(seconds) < run.config.train.num_steps:
        raise UserError(
            f"{run.path / 'metrics.jsonl'} has {len(seconds)} of "
            f"{run.config.train.num_steps} steps on record; remove {run.path}, and the same "
            "command trains that run again"
        )
    elapsed = np.concatenate([[0.0], np.cumsum(seconds)])
    curves: dict[str, Any] = {"steps": steps, "seconds": [float(elapsed[step]) for step in steps]}
    for split in (TRAIN, UNSEEN):
        names = dict.fromkeys(
            name.removesuffix("_mean")
            for name in ("reward_mean", *evaluations[steps[0]][split])
            if name.endswith("_mean")
        )
        curves[split] = {
            score_name(name): [evaluations[s][split].get(f"{name}_mean") for s in steps]
            for name in names
        }
    return curves


def spread_over_seeds(curves: Sequence[Sequence[float | None]]) -> dict[str, list[float | None]]:
    """Mean, sample standard deviation (0 of one seed), lowest and highest at each evaluation."""
    values = np.array([[np.nan if v is None else v for v in curve] for curve in curves], float)
    std = values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    columns = {"mean": values.mean(0), "std": std, "low": values.min(0), "high": values.max(0)}
    return {name: [_number(v) for v in column] for name, column in columns.items()}


def _number(value: Any) -> float | None:
    """As JSON and pages have it: None for what is not finite."""
    return float(value) if np.isfinite(value) else None


def _compare_with(curves: dict[str, dict[str, Any]], baseline: str) -> None:
    reward = curves[baseline][TRAIN]["reward"]["mean"]
    best = max((value for value in reward if value is not None), default=np.inf)
    needed = queries_to_reach(best, curves[baseline]["queries"], reward)
    for curve in curves.values():
        queries = queries_to_reach(best, curve["queries"], curve[TRAIN]["reward"]["mean"])
        curve["queries_to_baseline"] = queries
        curve["speedup"] = needed / queries if queries and needed else None


def queries_to_reach(
    level: float, queries: Sequence[float], rewards: Sequence[float | None]
) -> float | None:
    """Where a curve, linear between its points, first comes to a level; None if it never does."""
    points = [(q, r) for q, r in zip(queries, rewards, strict=True) if r is not None]
    for (q0, r0), (q1, r1) in zip([*points[:1], *points[:-1]], points, strict=True):
        if r1 >= level:
            return float(q1 if r1 == r0 else q0 + (q1 - q0) * max(0.0, (level - r0) / (r1 - r0)))
    return None


def table(results: Mapping[str, Any]) -> str:
    """The results as a table of Markdown for each reward: last evaluation, mean ± std of seeds."""
    lines = []
    for reward, methods in results["rewards"].items():
        judges = sorted({name for m in methods.values() for name in m[UNSEEN]} - {"reward"})
        judges = [name for name in judges if not name.startswith("reward/")]
        titles = ["method", "reward", "unseen", "best unseen", "fewer queries", *judges]
        titles += ["s/step", "GB"]
        lines += [f"**{reward}**", "", _row(titles), _row(["---"] * len(titles))]
        for name, method in methods.items():
            unseen = method[UNSEEN]
            best = max((v for v in unseen["reward"]["mean"] if v is not None), default=np.nan)
            speedup = method.get("speedup")
            cells = [name, _last(method[TRAIN]["reward"]), _last(unseen["reward"]), f"{best:.2f}"]
            cells.append(f"{speedup:.1f}x" if speedup else "-")
            cells += [_last(unseen[judge]) if judge in unseen else "-" for judge in judges]
            seconds, memory = method["seconds_per_step"], method["peak_rss_gb"]
            cells.append("-" if seconds is None else f"{seconds:.2f}")
            cells.append("-" if memory is None else f"{memory:.1f}")
            lines.append(_row(cells))
        lines.append("")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _last(curve: Mapping[str, Sequence[float | None]]) -> str:
    mean, std = curve["mean"][-1], curve["std"][-1]
    return "-" if mean is None else f"{mean:.2f} ± {std or 0:.2f}"
