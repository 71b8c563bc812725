"""The way of the reward's gradient through a sample, in which reward backpropagations differ."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from alignprop_jax.core.truncation import STRATEGIES, Spaced, Truncation
from alignprop_jax.errors import UserError

REWARD_AT = ("sample", "prediction")


class StepDraw(NamedTuple):
    """What one update draws for its samples."""

    trained: Bool[Array, " t"]  # at which steps the gradient enters the network
    stop: Int[Array, ""] | None  # the last step that is run; None for all


@dataclasses.dataclass(frozen=True)
class GradientPath:
    """Where the gradient enters the denoiser, what it crosses, and what it comes from.

    Attributes:
        truncation: which steps are trained.
        detach_input: the denoiser's input is a constant to the gradient, which then reaches the
            factors by each trained step's own output, and crosses steps by the linear term of
            the process alone (DRTune, arXiv 2405.00760).
        reward_at: what the reward sees:
            "sample", the sampled image;
            "prediction", the image predicted at a random late step, where sampling stops (ReFL,
            arXiv 2304.05977).
        stop_share: "prediction" stops at one of this share of the steps, the last ones, each as
            likely; rounded, and at least one.
        renoise: copies of each sample that are noised to the last timestep and denoised again,
            with gradient, to be scored beside it (DRaFT-LV, arXiv 2309.17400).
    """

    truncation: Truncation
    detach_input: bool = False
    reward_at: str = "sample"
    stop_share: float = 0.25
    renoise: int = 0

    def check(self, num_steps: int) -> None:
        """Raises UserError unless the settings agree with each other and with `num_steps`."""
        self.truncation.check(num_steps)
        if self.reward_at not in REWARD_AT:
            raise UserError(
                f"gradient.reward_at is {self.reward_at!r}; supported: {', '.join(REWARD_AT)}"
            )
        if self.renoise < 0:
            raise UserError(f"gradient.renoise is {self.renoise}; it must be 0 or more")
        if self.reward_at == "prediction":
            self._check_early_stop(num_steps)

    def _check_early_stop(self, num_steps: int) -> None:
        if not 0 < self.stop_share <= 1:
            raise UserError(f"gradient.stop_share is {self.stop_share}; it must be in (0, 1]")
        if self.renoise:
            raise UserError(
                f"gradient.renoise is {self.renoise}, but gradient.reward_at 'prediction' stops "
                "before there is a sample to noise again; set gradient.renoise to 0, or "
                "gradient.reward_at to sample"
            )
        if not self.truncation.follows_stops:
            names = {strategy: name for name, strategy in STRATEGIES.items()}
            suitable = [name for name, strategy in STRATEGIES.items() if strategy.follows_stops]
            raise UserError(
                f"truncation.strategy is {names[type(self.truncation)]!r}, which draws from all "
                f"{num_steps} steps, but gradient.reward_at 'prediction' does not run them all; "
                f"set truncation.strategy to {' or '.join(suitable)}, or gradient.reward_at to "
                "sample"
            )
        earliest = num_steps - self._num_stops(num_steps)
        spaced = isinstance(self.truncation, Spaced)
        if spaced and self.truncation.latest_phase(num_steps) > earliest:
            raise UserError(
                f"truncation.k is {self.truncation.k}: the first of so many spaced steps may be "
                f"step {self.truncation.latest_phase(num_steps)}, but with gradient.stop_share "
                f"{self.stop_share} sampling may stop at step {earliest} already; raise "
                "truncation.k or lower gradient.stop_share"
            )

    def draw(self, key: Key[Array, ""], num_steps: int) -> StepDraw:
        """Draws for samples of T = `num_steps` steps, using up `key`."""
        if self.reward_at == "sample":
            return StepDraw(self.truncation.draw(key, num_steps), None)
        stop_key, steps_key = jax.random.split(key)
        stop = jax.random.randint(stop_key, (), num_steps - self._num_stops(num_steps), num_steps)
        trained = self.truncation.draw(steps_key, num_steps, stop)
        return StepDraw(trained & (jnp.arange(num_steps) <= stop), stop)

    def never_trained(self, num_steps: int) -> int:
        """How many of the first of T = `num_steps` steps no draw trains; 0 for early stops."""
        return self.truncation.never_trained(num_steps) if self.reward_at == "sample" else 0

    def _num_stops(self, num_steps: int) -> int:
        return max(1, round(self.stop_share * num_steps))
