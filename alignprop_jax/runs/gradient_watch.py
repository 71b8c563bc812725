"""Stops a run whose gradient shows that no step will train anything."""

import math

from ml_collections import ConfigDict

from alignprop_jax.records.checkpoints import Checkpoints
from alignprop_jax.errors import UserError, note
from alignprop_jax.records.metrics import Record

# After so many steps in a row without a finite gradient, no later one will have it.
MAX_SKIPPED_IN_A_ROW = 10
# After so many first ones of 0, none will be other: a reward may be flat where one batch lies.
MAX_FIRST_AT_REST = 10


class GradientWatch:
    """Looks at the metrics of every step.

    Args:
        config: of the run.
        first_step: how many steps were made before; a run that is resumed has learnt already.
    """

    def __init__(self, config: ConfigDict, first_step: int):
        self._config = config
        self._at_rest = first_step == 0  # whether no step has had a gradient yet
        self._steps_at_rest = 0

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
        # A draw may train no step of the sampler.
        trains = metrics["start_step"] < self._config.sampler.num_steps
        if self._at_rest and (trains or self._config.gradient.renoise):
            self._at_rest = metrics["grad_norm"] == 0
            if self._at_rest:
                self._stay_at_rest(step)

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

    def _stay_at_rest(self, step: int) -> None:
        self._steps_at_rest += 1
        most = min(MAX_FIRST_AT_REST, self._config.train.num_steps)
        what = (
            f"the reward {self._config.reward!r} does not change with these images: it may be flat "
            "where they lie, or worth the same for all"
        )
        if self._steps_at_rest >= most:
            raise UserError(
                f"the gradient was exactly 0 up to step {step}, so nothing is trained; {what}"
            )
        note(f"the gradient is exactly 0 at first; {what}; {most} such steps stop the run")
