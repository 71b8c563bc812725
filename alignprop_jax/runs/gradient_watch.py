"""Stops a run whose gradient shows that no step will train anything."""

import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from alignprop_jax.records.checkpoints import Checkpoints
from alignprop_jax.errors import UserError, note
from alignprop_jax.records.metrics import Record

# After so many steps in a row without a finite gradient, no later one will have it.
MAX_SKIPPED_IN_A_ROW = 10
# After so many first ones of 0, none will be other: a reward may be flat where one batch lies.
MAX_FIRST_AT_REST = 10


def count_rest(config: ConfigDict, records: Sequence[Record]) -> int | None:
    """How many steps of a run had a gradient of 0; None where any had another.

    Args:
        records: the metrics of its steps. A step that drew no step of the sampler does not count.
    """
    norms = [record["grad_norm"] for record in records if _trains(config, record)]
    return None if any(norm != 0 for norm in norms) else len(norms)


def _trains(config: ConfigDict, record: Record) -> bool:
    return record["start_step"] < config.sampler.num_steps or config.gradient.renoise > 0


class GradientWatch:
    """Looks at the metrics of every step.

    Args:
        config: of the run.
        rest: `count_rest` of the steps before.
    """

    def __init__(self, config: ConfigDict, rest: int | None):
        self._config = config
        self._rest = rest

    def look(self, step: int, metrics: Record, checkpoints: Checkpoints) -> None:
        """Looks at one step.

        Raises:
            UserError: the gradient was not finite `MAX_SKIPPED_IN_A_ROW` steps in a row, or exactly
                0 in the first `MAX_FIRST_AT_REST`, or in all where there are fewer.
        """
        if metrics["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
            kept = checkpoints.latest_step
            checkpoint = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint yet"
            raise UserError(
                f"the gradient was NaN or infinite {MAX_SKIPPED_IN_A_ROW} steps in a row, up to "
                f"step {step} ({checkpoint}); {self._why_not_finite(metrics)}"
            )
        now = count_rest(self._config, [metrics])
        self._rest = None if now is None or self._rest is None else self._rest + now
        if self._rest:
            self._warn_of_rest(step, self._rest)

    def _why_not_finite(self, metrics: Record) -> str:
        parts = {
            name.removeprefix("reward/"): value
            for name, value in metrics.items()
            if name.startswith("reward/")
        }
        rewards = parts or {self._config.reward: metrics["reward_mean"]}
        lost = [
            f"{name!r} is {value}" for name, value in rewards.items() if not math.isfinite(value)
        ]
        if lost:
            return f"of the reward, the mean of {' and of '.join(lost)} there: check it"
        return (
            "the reward is finite there: lower config.train.learning_rate, or check its derivative"
        )

    def _warn_of_rest(self, step: int, rest: int) -> None:
        most = min(MAX_FIRST_AT_REST, self._config.train.num_steps)
        what = (
            f"the reward {self._config.reward!r} does not change with these images: it may be flat "
            "where they lie, worth the same for all, or too small by config.loss.scale"
        )
        if rest >= most:
            raise UserError(
                f"the gradient was exactly 0 up to step {step}, so nothing is trained; {what}"
            )
        note(f"the gradient is exactly 0 at first; {what}; {most} such steps stop the run")
