"""What a training run carries from one step to the next, and nothing else."""

import flax.struct
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, Key, PyTree


@flax.struct.dataclass
class TrainState:
    """The state after `step` steps; frozen weights are not part of it.

    The key never changes: the randomness of a step is derived from it and from `step`, so that a
    resumed run draws what an uninterrupted one would have drawn.
    """

    step: Int[Array, ""]
    lora: PyTree
    opt_state: PyTree
    key: Key[Array, ""]
    skipped: Int[Array, ""]  # steps whose update was left out, in all
    skipped_in_a_row: Int[Array, ""]  # ... up to and including the last step
    history: PyTree = None  # what the algorithm remembers of earlier steps

    def after(
        self, finite: Bool[Array, ""], lora: PyTree, opt_state: PyTree, history: PyTree = None
    ) -> "TrainState":
        """The state after one more step, whose update was left out unless it was finite."""
        return self.replace(
            step=self.step + 1,
            lora=lora,
            opt_state=opt_state,
            skipped=self.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, self.skipped_in_a_row + 1),
            history=history,
        )


def create_train_state(
    lora: PyTree,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    history: PyTree = None,
) -> TrainState:
    """Builds the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        lora=lora,
        opt_state=optimizer.init(lora),
        key=key,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        history=history,
    )
