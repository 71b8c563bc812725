"""Truncated backpropagation through time: which denoising steps the reward's gradient may enter.

Step 0 is the noisiest of T. AlignProp (arXiv 2310.03739) trains a suffix of random length; its
releases differ in how they draw it.
"""

import dataclasses
import statistics
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from alignprop_jax.errors import UserError


class Truncation(Protocol):
    """How the trained steps of a sample are drawn.

    Attributes:
        follows_stops: it trains steps wherever sampling stops; others may draw none that is run.
    """

    follows_stops: ClassVar[bool]

    def check(self, num_steps: int) -> None:
        """Raises UserError unless T = `num_steps` steps can be drawn from."""

    def expected_steps(self, num_steps: int) -> float:
        """How many of T steps are trained in the mean, where all are run."""

    def never_trained(self, num_steps: int) -> int:
        """How many of the first of T steps no draw trains, where all are run."""

    def draw(
        self, key: Key[Array, ""], num_steps: int, stop: Int[Array, ""] | None = None
    ) -> Bool[Array, " t"]:
        """Draws the trained ones of T steps, using up `key`.

        Where the value is False, the network's output is a constant to the gradient.

        Args:
            stop: the last step that is run; None for all.
        """


@dataclasses.dataclass(frozen=True)
class Full:
    """Every step."""

    follows_stops = False

    def check(self, num_steps):
        pass

    def expected_steps(self, num_steps):
        return num_steps

    def never_trained(self, num_steps):
        return 0

    def draw(self, key, num_steps, stop=None):
        return jnp.ones(num_steps, bool)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The steps from `start` on."""

    start: int = 0

    follows_stops = False

    def check(self, num_steps):
        if not 0 <= self.start <= num_steps:
            raise UserError(
                f"truncation.start is {self.start}; with {num_steps} sampler steps it must lie "
                f"between 0 and {num_steps}"
            )

    def expected_steps(self, num_steps):
        return num_steps - self.start

    def never_trained(self, num_steps):
        return self.start

    def draw(self, key, num_steps, stop=None):
        return jnp.arange(num_steps) >= self.start


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The steps from a cut-off on that is uniform over `min` to `max`, both included.

    A cut-off of T trains nothing.
    """

    min: int = 0
    max: int = 0

    follows_stops = False

    def check(self, num_steps):
        if not 0 <= self.min <= self.max <= num_steps:
            raise UserError(
                f"truncation.min is {self.min} and truncation.max is {self.max}; with {num_steps} "
                f"sampler steps they must be in order and lie between 0 and {num_steps}"
            )

    def expected_steps(self, num_steps):
        return num_steps - (self.min + self.max) / 2

    def never_trained(self, num_steps):
        return self.min

    def draw(self, key, num_steps, stop=None):
        return jnp.arange(num_steps) >= jax.random.randint(key, (), self.min, self.max + 1)


class PerStep(Uniform):
    """A fresh uniform cut-off at every step.

    It scatters the trained steps and makes late ones more likely.
    """

    def draw(self, key, num_steps, stop=None):
        cutoffs = jax.random.randint(key, (num_steps,), self.min, self.max + 1)
        return jnp.arange(num_steps) >= cutoffs


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The steps from a cut-off on that is the floor of a truncated normal variable.

    The variable lies in [1, T), so that at least the last step is trained.
    """

    mean: float = 0.0
    std: float = 1.0

    follows_stops = False

    def check(self, num_steps):
        if num_steps < 2:
            raise UserError("truncation.strategy 'gaussian' needs at least 2 sampler steps")
        if not self.std > 0:
            raise UserError(f"truncation.std is {self.std}; it must be positive")
        if not 1 <= self.mean < num_steps:
            raise UserError(
                f"truncation.mean is {self.mean}; with {num_steps} sampler steps it must be at "
                f"least 1 and below {num_steps}"
            )

    def expected_steps(self, num_steps):
        # Sums over steps the probability that the truncated normal variable lies below the next.
        normal = statistics.NormalDist(self.mean, self.std)
        low, high = normal.cdf(1), normal.cdf(num_steps)
        below = sum(normal.cdf(step + 1) - low for step in range(1, num_steps))
        return below / (high - low)

    def never_trained(self, num_steps):
        return 1

    def draw(self, key, num_steps, stop=None):
        lower, upper = (1 - self.mean) / self.std, (num_steps - self.mean) / self.std
        drawn = self.mean + self.std * jax.random.truncated_normal(key, lower, upper)
        # Rounding in float32 may reach the open end of the interval.
        cutoff = jnp.clip(jnp.floor(drawn), 1, num_steps - 1)
        steps = jnp.arange(num_steps)
        return steps >= cutoff.astype(steps.dtype)


@dataclasses.dataclass(frozen=True)
class Last:
    """The last `k` steps that are run."""

    k: int = 1

    follows_stops = True

    def check(self, num_steps):
        _check_k(self.k, num_steps)

    def expected_steps(self, num_steps):
        return self.k

    def never_trained(self, num_steps):
        return num_steps - self.k

    def draw(self, key, num_steps, stop=None):
        last = num_steps - 1 if stop is None else stop
        return jnp.arange(num_steps) > last - self.k


@dataclasses.dataclass(frozen=True)
class Spaced:
    """`k` steps that lie T // k apart, the first of them random."""

    k: int = 1

    follows_stops = True

    def check(self, num_steps):
        _check_k(self.k, num_steps)

    def latest_phase(self, num_steps: int) -> int:
        """Where the first of them is at the latest; at the earliest it is step 0."""
        return num_steps - 1 - (self.k - 1) * (num_steps // self.k)

    def expected_steps(self, num_steps):
        return self.k

    def never_trained(self, num_steps):
        return 0

    def draw(self, key, num_steps, stop=None):
        phase = jax.random.randint(key, (), 0, self.latest_phase(num_steps) + 1)
        nth, between = jnp.divmod(jnp.arange(num_steps) - phase, num_steps // self.k)
        return (between == 0) & (0 <= nth) & (nth < self.k)


STRATEGIES: dict[str, type] = {
    "full": Full,
    "fixed": Fixed,
    "uniform": Uniform,
    "gaussian": Gaussian,
    "per_step": PerStep,
    "last": Last,
    "spaced": Spaced,
}
"""By their names in a config."""


def make_truncation(strategy: str, **settings: float) -> Truncation:
    """The truncation of that name, with those of the settings that it has.

    The others may hold anything: a config has those of all strategies.

    Raises:
        UserError: there is no such strategy.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"truncation.strategy is {strategy!r}; supported: {', '.join(STRATEGIES)}")
    chosen = STRATEGIES[strategy]
    names = {field.name for field in dataclasses.fields(chosen)}
    return chosen(**{name: value for name, value in settings.items() if name in names})


def first_trained_step(trained: Bool[Array, " t"]) -> Int[Array, ""]:
    """Index of the first trained step; T when nothing is trained."""
    return jnp.where(jnp.any(trained), jnp.argmax(trained), trained.shape[0])


def _check_k(k: int, num_steps: int) -> None:
    if not 1 <= k <= num_steps:
        raise UserError(
            f"truncation.k is {k}; with {num_steps} sampler steps it must lie between 1 "
            f"and {num_steps}"
        )
