"""Truncated backpropagation through time: which denoising steps the reward's gradient may enter."""

import dataclasses
import statistics

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from alignprop_jax.errors import UserError

STRATEGIES = ("full", "fixed", "uniform", "gaussian", "per_step", "last", "spaced")


@dataclasses.dataclass(frozen=True)
class Truncation:
    """How the trained steps of a sample are drawn, step 0 being the noisiest of T.

    AlignProp (arXiv 2310.03739) trains a suffix of random length; its releases differ in how they
    draw it. A strategy reads its own settings only; the others may hold anything.

    Attributes:
        strategy: one of
            "full", every step;
            "fixed", the steps from `start` on;
            "uniform", the steps from a cut-off on that is uniform over `min` to `max` inclusive (a
            cut-off of T trains nothing);
            "gaussian", the same with the floor of a normal variable of `mean` and `std` that is
            truncated to [1, T), so that at least the last step is trained;
            "per_step", a fresh uniform cut-off at every step, which scatters the trained steps and
            makes late ones more likely;
            "last", the last `k` steps that are run;
            "spaced", `k` steps that lie T // k apart, the first of them random.
        start: see "fixed".
        mean: see "gaussian".
        std: see "gaussian".
        min: see "uniform" and "per_step".
        max: see "uniform" and "per_step".
        k: see "last" and "spaced".
    """

    strategy: str
    start: int = 0
    mean: float = 0.0
    std: float = 1.0
    min: int = 0
    max: int = 0
    k: int = 1

    def check(self, num_steps: int) -> None:
        """Raises UserError unless `num_steps` sampler steps can be drawn from."""
        if self.strategy not in STRATEGIES:
            raise UserError(
                f"truncation.strategy is {self.strategy!r}; supported: {', '.join(STRATEGIES)}"
            )
        if self.strategy == "fixed" and not 0 <= self.start <= num_steps:
            raise UserError(
                f"truncation.start is {self.start}; with {num_steps} sampler steps it must lie "
                f"between 0 and {num_steps}"
            )
        if self.strategy in ("uniform", "per_step") and not 0 <= self.min <= self.max <= num_steps:
            raise UserError(
                f"truncation.min is {self.min} and truncation.max is {self.max}; with {num_steps} "
                f"sampler steps they must be in order and lie between 0 and {num_steps}"
            )
        if self.strategy in ("last", "spaced") and not 1 <= self.k <= num_steps:
            raise UserError(
                f"truncation.k is {self.k}; with {num_steps} sampler steps it must lie between 1 "
                f"and {num_steps}"
            )
        if self.strategy == "gaussian":
            if num_steps < 2:
                raise UserError("truncation.strategy 'gaussian' needs at least 2 sampler steps")
            if not self.std > 0:
                raise UserError(f"truncation.std is {self.std}; it must be positive")
            if not 1 <= self.mean < num_steps:
                raise UserError(
                    f"truncation.mean is {self.mean}; with {num_steps} sampler steps it must be at "
                    f"least 1 and below {num_steps}"
                )

    def latest_phase(self, num_steps: int) -> int:
        """Where the first of the "spaced" steps is at the latest; at the earliest it is step 0."""
        return num_steps - 1 - (self.k - 1) * (num_steps // self.k)

    def expected_steps(self, num_steps: int) -> float:
        """How many of T = `num_steps` steps are trained in the mean, where all are run."""
        match self.strategy:
            case "full":
                return num_steps
            case "fixed":
                return num_steps - self.start
            case "last" | "spaced":
                return self.k
            case "uniform" | "per_step":
                return num_steps - (self.min + self.max) / 2
        # Sums over steps the probability that the truncated normal variable lies below the next.
        normal = statistics.NormalDist(self.mean, self.std)
        low, high = normal.cdf(1), normal.cdf(num_steps)
        below = sum(normal.cdf(step + 1) - low for step in range(1, num_steps))
        return below / (high - low)

    def never_trained(self, num_steps: int) -> int:
        """How many of the first of T = `num_steps` steps no draw trains, where all are run."""
        match self.strategy:
            case "fixed":
                return self.start
            case "last":
                return num_steps - self.k
            case "uniform" | "per_step":
                return self.min
            case "gaussian":
                return 1
        return 0

    def draw(
        self, key: Key[Array, ""], num_steps: int, stop: Int[Array, ""] | None = None
    ) -> Bool[Array, " t"]:
        """Draws the trained ones of T = `num_steps` steps, using up `key`.

        Where the value is False, the denoiser's output is a constant to the gradient.

        Args:
            stop: the last step that is run; None for all.
        """
        steps = jnp.arange(num_steps)
        if self.strategy == "last":
            return steps > (num_steps - 1 if stop is None else stop) - self.k
        if self.strategy == "spaced":
            since_first = steps - jax.random.randint(key, (), 0, self.latest_phase(num_steps) + 1)
            nth, between = jnp.divmod(since_first, num_steps // self.k)
            return (between == 0) & (0 <= nth) & (nth < self.k)
        if self.strategy == "full":
            return jnp.ones(num_steps, bool)
        if self.strategy == "fixed":
            return steps >= self.start
        if self.strategy == "uniform":
            return steps >= jax.random.randint(key, (), self.min, self.max + 1)
        if self.strategy == "gaussian":
            lower, upper = (1 - self.mean) / self.std, (num_steps - self.mean) / self.std
            draw = self.mean + self.std * jax.random.truncated_normal(key, lower, upper)
            # Rounding in float32 may reach the open end of the interval.
            cutoff = jnp.clip(jnp.floor(draw), 1, num_steps - 1)
            return steps >= cutoff.astype(steps.dtype)
        return steps >= jax.random.randint(key, (num_steps,), self.min, self.max + 1)


def first_trained_step(trained: Bool[Array, " t"]) -> Int[Array, ""]:
    """Index of the first trained step; T when nothing is trained."""
    return jnp.where(jnp.any(trained), jnp.argmax(trained), trained.shape[0])
