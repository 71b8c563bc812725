"""The chain of denoising steps as a differentiable scan, and the four ways to run it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from alignprop_jax.core.gate import KEEPS_ARGUMENTS_ALONE, REMAT_POLICIES, gate_gradient
from alignprop_jax.core.generator import Adapter, Generator, Steps
from alignprop_jax.core.guidance import Guidance, interleave
from alignprop_jax.errors import UserError

# A loop of their own takes its time to compile; that of fewer steps does not pay.
_LEAST_APART = 0.25


def steps_apart(never_trained: int, num_steps: int) -> int:
    """How many of the steps that no draw trains have a loop of their own, which keeps nothing."""
    return never_trained if never_trained >= _LEAST_APART * num_steps else 0


class Inputs(NamedTuple):
    """What a chain is run on, of b samples."""

    start: PyTree  # states before the first step, see `Generator.start`
    prompts: PyTree  # encoded
    negative: PyTree  # encoded negative prompts, one a sample or one for all
    keys: Key[Array, " b"]  # of each sample: it does not depend on its batch then


class Trajectory(NamedTuple):
    """Samples and the way to them."""

    samples: PyTree
    states: PyTree  # [b, t+1, ...], from the start to the last one, which is finished
    log_probs: Float[Array, "b t"]  # of each step, see `Generator.log_prob`


@dataclasses.dataclass(frozen=True)
class Chain:
    """T steps of a generator, differentiable: the sampler of AlignProp (arXiv 2310.03739).

    Attributes:
        generator: what takes the steps.
        num_steps: T.
        guidance: from the generator's `guidance`.
        eta: how random a step is, see `Generator.schedule`.
        remat: what of each step is stored for the backward pass, see `gate_gradient`. What "block"
            does besides is up to the generator, see `Generator.rematerialized`.
        detach_input: the network's input is a constant to the gradient, see `GradientPath`.

    Raises:
        UserError: for a setting that the generator cannot follow.
    """

    generator: Generator
    num_steps: int
    guidance: Guidance
    eta: float = 0.0
    remat: str = "step"
    detach_input: bool = False

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat is {self.remat!r}; supported: {', '.join(REMAT_POLICIES)}")
        self.generator.schedule(self.num_steps, self.eta)

    def predict(self, adapter: Adapter | None, state: PyTree, constants: Any) -> PyTree:
        """A guided prediction.

        Args:
            constants: the network's weights, what `guidance.pair` gave, and the constants of the
                step, the same for all samples or a row for each.
        """
        weights, prompts, at = constants
        if self.remat in KEEPS_ARGUMENTS_ALONE:
            # Weights that are split over devices are to be gathered here, layer by layer. XLA would
            # do so once for all steps, and keep them whole.
            weights, state = jax.lax.optimization_barrier((weights, state))
        if self.detach_input:
            state = jax.lax.stop_gradient(state)
        state, at = (jax.tree.map(self.guidance.spread, x) for x in (state, at))
        prediction = self.generator.predict(weights, adapter, state, at, prompts)
        return self.guidance.combine(prediction)

    def sample(
        self,
        params: Any,
        adapter: Adapter | None,
        inputs: Inputs,
        trained: Bool[Array, " t"] | None = None,
        *,
        never_trained: int = 0,
        adapter_timesteps: tuple[Int[Array, ""], Int[Array, ""]] | None = None,
    ) -> PyTree:
        """Takes all steps.

        Args:
            params: the frozen parameters of the generator.
            adapter: None for the base model.
            inputs: of the samples.
            trained: the steps at which the gradient enters the network; None for none. Elsewhere
                the prediction is a constant, while the state keeps its gradient, so that it crosses
                an untrained step along the terms of `Generator.advance` that do not go through the
                network.
            never_trained: how many of the first steps are False in every `trained`: nothing is kept
                of them.
            adapter_timesteps: the highest and the lowest timestep at which the adapter is on, both
                included; None for all.

        `trained` and `adapter_timesteps` are data: one compiled program serves all of them.

        Returns:
            The samples, b of them.
        """
        take = self._step(params, inputs, adapter_timesteps=adapter_timesteps)

        def body(adapter, state, row):
            return take(adapter, state, row)[0], None

        state, _ = self._scan(body, adapter, inputs.start, self._steps(), trained, never_trained)
        return self.generator.finish(params, state)

    def sample_until(
        self,
        params: Any,
        adapter: Adapter | None,
        inputs: Inputs,
        trained: Bool[Array, " t"],
        stop: Int[Array, ""],
    ) -> PyTree:
        """Takes the steps up to `stop`, whose sample is the clean state that it predicts.

        Steps after it cost nothing and must not be trained. `stop` is data: one compiled program
        serves every one. The other arguments are those of `sample`.
        """
        take = self._step(params, inputs)

        def body(adapter, state, row):
            runs = row.index <= stop
            moved, _ = take(adapter, state, row, runs)
            return jax.tree.map(functools.partial(jnp.where, runs), moved, state), None

        steps = self._steps().ending_at(stop)
        state, _ = self._scan(body, adapter, inputs.start, steps, trained)
        return self.generator.finish(params, state)

    def sample_with_copies(
        self,
        params: Any,
        adapter: Adapter | None,
        inputs: Inputs,
        trained: Bool[Array, " t"],
        copies: int,
        *,
        never_trained: int = 0,
    ) -> PyTree:
        """Takes all steps, and the last one again from states that are noised anew.

        A copy of a sample is its clean state, a constant to the gradient, noised to before the last
        step, which is then taken and trained. The other arguments are those of `sample`.

        Returns:
            The samples, each followed by its copies: (1 + copies) b of them.
        """
        # A copy is one more turn of the scan, after which the sample itself is carried on.
        num_rows = self.num_steps + copies
        take = self._step(params, inputs)

        def body(adapter, carried, row):
            is_copy = row.index >= self.num_steps
            # Numbers below num_rows are of the keys that steps draw from.
            keys = _fold(inputs.keys, num_rows + row.index)
            noisy = self.generator.renoise(jax.lax.stop_gradient(carried), row.at, keys)
            choose = functools.partial(jnp.where, is_copy)
            moved, _ = take(adapter, jax.tree.map(choose, noisy, carried), row)
            return jax.tree.map(choose, carried, moved), moved

        steps = self._steps().repeating_the_last(copies)
        trained = jnp.append(trained, jnp.ones(copies, bool))
        state, visited = self._scan(body, adapter, inputs.start, steps, trained, never_trained)
        together = jax.tree.map(lambda x, rows: interleave(x, *rows[-copies:]), state, visited)
        return self.generator.finish(params, together)

    def sample_trajectory(self, params: Any, adapter: Adapter | None, inputs: Inputs) -> Trajectory:
        """Takes all steps without gradient and keeps every state; arguments as of `sample`."""
        take = self._step(params, inputs)

        def body(adapter, state, row):
            moved, prediction = take(adapter, state, row)
            log_probs = self.generator.log_prob(prediction, state, moved, row.at)
            return moved, (moved, log_probs)

        state, after = self._scan(body, adapter, inputs.start, self._steps())
        visited, log_probs = jax.tree.map(lambda x: x.swapaxes(0, 1), after)
        states = jax.tree.map(
            lambda start, rest: jnp.concatenate([start[:, None], rest], 1), inputs.start, visited
        )
        return Trajectory(self.generator.finish(params, state), states, log_probs)

    def _steps(self) -> Steps:
        return self.generator.schedule(self.num_steps, self.eta)

    def _step(
        self,
        params: Any,
        inputs: Inputs,
        adapter_timesteps: tuple[Int[Array, ""], Int[Array, ""]] | None = None,
    ) -> Callable[..., tuple[PyTree, PyTree]]:
        """`take(adapter, state, row, runs=None) -> (next state, prediction)`, of one step.

        Where `runs` is False nothing is evaluated, and what is returned means nothing.
        """
        gated = gate_gradient(self.predict, self.remat)
        weights = self.generator.network(params)
        prompts = self.guidance.pair(inputs.prompts, inputs.negative)
        is_random = self.generator.is_random(self.eta)

        def take(adapter, state, row, runs=None):
            if adapter is not None and adapter_timesteps is not None:
                high, low = adapter_timesteps
                adapter = adapter.scaled((low <= row.at.timesteps) & (row.at.timesteps <= high))
            prediction = gated(row.is_trained, adapter, state, (weights, prompts, row.at), runs)
            keys = _fold(inputs.keys, row.index) if is_random else None
            return self.generator.advance(prediction, state, row.at, keys), prediction

        return take

    def _scan(
        self,
        body: Callable[..., tuple[PyTree, PyTree]],
        adapter: Adapter | None,
        start: PyTree,
        steps: Steps,
        trained: Bool[Array, " t"] | None = None,
        never_trained: int = 0,
    ) -> tuple[PyTree, PyTree]:
        """Scans `body(adapter, state, row)`.

        Steps that no draw trains have a loop of their own, which keeps nothing, where that pays.
        """
        number = len(steps.timesteps)
        if trained is None:
            trained = jnp.zeros(number, bool)
        rows = _Row(jnp.arange(number), trained, jax.tree.map(jnp.asarray, steps))
        state = start
        first = steps_apart(never_trained, self.num_steps)
        if first and self.remat not in KEEPS_ARGUMENTS_ALONE:
            before = jax.tree.map(lambda x: x[:first], rows)
            rows = jax.tree.map(lambda x: x[first:], rows)
            constant = jax.lax.stop_gradient(adapter)
            state, _ = jax.lax.scan(functools.partial(body, constant), state, before)
            state = jax.lax.stop_gradient(state)
        return jax.lax.scan(functools.partial(body, adapter), state, rows)


class _Row(NamedTuple):
    """What the scan hands one step."""

    index: Int[Array, ""]
    is_trained: Bool[Array, ""]
    at: Steps


def _fold(keys: Key[Array, " b"], number: Int[Array, ""]) -> Key[Array, " b"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
