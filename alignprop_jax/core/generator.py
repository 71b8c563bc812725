"""What the rest of the package knows of a model that is tuned: the protocol of a generator.

A generator makes a sample in a chain of T steps. Each step evaluates a network on the state of the
chain, which gives a prediction, and moves the state by that prediction:

    state = start(key)
    for at in schedule(T, eta):
        prediction = predict(weights, adapter, state, at, conditioning)
        state = advance(prediction, state, at, key)
    sample = finish(params, state)

State, prediction, conditioning and sample are pytrees of arrays whose leading axis is the batch; a
generator chooses their shapes. Latents, velocities and pictures are such, and so are a canvas of
tokens with its soft embeddings, logits and a text.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from alignprop_jax.core.guidance import Guidance

Weights = PyTree[Array]


class Adapter(Protocol):
    """What training changes, in the form in which a network takes it: a pytree.

    See `lora.adapters`.
    """

    def scaled(self, scale: float | Float[Array, ""] | Bool[Array, ""]) -> "Adapter":
        """The same change of the weights, times a scale."""

    def variables(self, weights: Weights) -> dict[str, Any]:
        """The variables of a Flax module with these weights and this change."""


class Steps(Protocol):
    """The constants of T steps, first step (most noise) first: a pytree with leading axis T.

    A scan hands each step its own row.
    """

    timesteps: Int[Array, " t"] | Float[Array, " t"]  # 1000, or thereabouts, is noise alone

    def ending_at(self, index: Int[Array, ""]) -> "Steps":
        """The same steps, but that at `index` ends at the clean state that it predicts."""

    def repeating_the_last(self, times: int) -> "Steps":
        """The same steps, and the last one so many times more."""


@runtime_checkable
class Generator(Protocol):
    """A model that is tuned: frozen modules and settings, hashable, without weights."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample as a reward takes it, such as height, width and 3 of a picture."""

    @property
    def num_timesteps(self) -> int:
        """Where timesteps begin: that of noise alone, or the next one."""

    def network(self, params: Any) -> Weights:
        """Of all frozen parameters, those that `predict` takes and an adapter changes."""

    def start(self, key: Key[Array, ""]) -> PyTree:
        """Draws the state before the first step of one sample, without the batch axis."""

    def schedule(self, num_steps: int, eta: float = 0.0) -> Steps:
        """Lays out a chain of `num_steps` steps.

        Args:
            num_steps: T, evaluations of the network.
            eta: how random a step is, from 0 to 1, where that is a choice.

        Raises:
            UserError: there is no such chain.
        """

    def is_random(self, eta: float) -> bool:
        """Whether a step draws random numbers at this eta."""

    def guidance(self, scale: float, shared: bool = True) -> Guidance:
        """How predictions are guided away from the negative prompt.

        Args:
            scale: weight of the guidance; 1 for none.
            shared: what both halves of guidance have in common is evaluated once.
        """

    def predict(
        self, weights: Weights, adapter: Adapter | None, state: PyTree, at: PyTree, prompts: PyTree
    ) -> PyTree:
        """Evaluates the network.

        Args:
            weights: from `network`.
            adapter: None for the base model.
            state: of b samples.
            at: constants of one step, the same for all samples or a row for each.
            prompts: encoded prompts, n of them where guidance needs several for a sample: a
                multiple of b, those of a sample one after the other.

        Returns:
            The predictions, n of them.
        """

    def advance(
        self, prediction: PyTree, state: PyTree, at: PyTree, keys: Key[Array, " b"] | None
    ) -> PyTree:
        """The state after one step, differentiable in the prediction and in the state.

        Args:
            prediction: of `state`, one a sample.
            state: before the step.
            at: constants of the step.
            keys: what the step draws from; None where it `is_random` not.
        """

    def renoise(self, state: PyTree, at: PyTree, keys: Key[Array, " b"]) -> PyTree:
        """Draws a state before the step `at` for the clean `state`."""

    def log_prob(
        self, prediction: PyTree, state: PyTree, next_state: PyTree, at: PyTree
    ) -> Float[Array, " b"]:
        """How likely a random step was to end where it did, `at` one step or a row for each."""

    def denoising_loss(
        self, predict: Any, state: PyTree, keys: Key[Array, " b"]
    ) -> Float[Array, " b"]:
        """The loss that the model was trained by, of clean states.

        Args:
            predict: `predict(state, at) -> prediction`.
            state: clean ones, as after the last step.
            keys: what noise and time are drawn from.
        """

    def finish(self, params: Any, state: PyTree) -> PyTree:
        """The samples of clean states, such as pictures in [0, 1]; differentiable."""

    def rematerialized(self) -> "Generator":
        """The same, whose backward pass evaluates each block of its networks again."""

    def on_one_device(self) -> "Generator":
        """The same, computed in a way that suits a batch of one on one device."""

    def weights_that_tell(self, params: Any) -> Sequence[Array]:
        """A few small weights that are others in every other model of this kind."""
