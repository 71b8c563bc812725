"""What every algorithm is, is given, and does with a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from alignprop_jax.algorithms.prompt_order import prompt_indices
from alignprop_jax.algorithms.state import TrainState
from alignprop_jax.core.chain import Chain, Inputs
from alignprop_jax.core.generator import Generator
from alignprop_jax.errors import UserError
from alignprop_jax.lora.adapters import Adaptation
from alignprop_jax.rewards.base import Reward

Metrics = dict[str, Array]


@flax.struct.dataclass
class PromptTable:
    """The P prompts of a run, encoded once, as the train step looks them up."""

    encoded: PyTree  # by the generator, leading axis P
    negative: PyTree  # the negative prompt, encoded, leading axis 1
    reward_inputs: PyTree  # from the reward's prepare, leading axis P

    @property
    def num_prompts(self) -> int:
        """P."""
        return jax.tree.leaves(self.encoded)[0].shape[0]

    def rows(self, indices: Int[Array, " b"]) -> tuple[PyTree, PyTree]:
        """Some of the prompts, encoded, and their reward inputs."""
        return jax.tree.map(lambda table: table[indices], (self.encoded, self.reward_inputs))


@flax.struct.dataclass
class Frozen:
    """What a train step is given and leaves as it is."""

    params: Any  # of the generator
    reward_params: Any
    prompts: PromptTable


TrainStep = Callable[[Frozen, TrainState], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What an algorithm makes its train step from.

    Attributes:
        chain: samples.
        reward: what is raised; its weights are an argument of the step.
        adaptation: how the trained tree changes the network.
        optimizer: of the trained tree.
        batch_size: samples a step.
        microbatch_size: samples in memory at a time, a divisor of the batch size; 0 for all.
        split_batch: makes a function of a batch run on every device with its share of the batch,
            from `sharding.split_batch`; by default there is one device.

    Raises:
        UserError: the microbatch size does not divide the batch size.
    """

    chain: Chain
    reward: Reward
    adaptation: Adaptation
    optimizer: optax.GradientTransformation
    batch_size: int
    microbatch_size: int = 0
    split_batch: Callable[[Callable], Callable] = lambda function: function

    def __post_init__(self):
        count_microbatches(self.batch_size, self.microbatch_size)


class Algorithm(Protocol):
    """How samples and their rewards become an update.

    Attributes:
        needs_reward_gradient: whether the reward has to have a gradient.
        shares_guidance: whether guidance may evaluate once what its halves have in common.
        detaches_input: see `Chain.detach_input`.
    """

    needs_reward_gradient: bool
    shares_guidance: bool
    detaches_input: bool

    def steps_kept(self, num_steps: int) -> tuple[float, float]:
        """Of how many steps of a sample something is kept, and how many are trained in the mean."""

    def open_gates(self, num_steps: int) -> tuple[float, float]:
        """The share of a sample's steps that are trained, and that are run at all, in the mean."""

    def start_history(self, num_prompts: int) -> PyTree:
        """What the algorithm remembers before the first step; None for nothing."""

    def check_batch(self, batch_size: int, num_devices: int) -> None:
        """Raises UserError unless the batch divides as the algorithm needs it to."""

    def make_step(self, setup: Setup) -> TrainStep:
        """Builds one update, a pure function to be jitted.

        A step whose loss or gradient is not finite leaves what is trained and the optimizer as they
        are, and is counted in the state.

        Metrics are scalars: loss, reward_mean, reward_std (over all samples), reward/NAME for the
        mean of each part of a sum of rewards, grad_norm (before clipping), start_step (the first
        step with gradient; the number of steps if there is none), skipped and skipped_in_a_row.
        """


class Draw(NamedTuple):
    """What one step draws for its batch."""

    indices: Int[Array, " b"]  # of the prompts
    keys: Key[Array, " b"]  # one a sample


def draw_batch(
    order_key: Key[Array, ""], samples_key: Key[Array, ""], step: Any, setup: Setup, table: Any
) -> Draw:
    """Draws the prompts and the keys of a step."""
    indices = prompt_indices(order_key, step, setup.batch_size, table.num_prompts)
    return Draw(indices, jax.random.split(samples_key, setup.batch_size))


def chain_inputs(generator: Generator, prompts: PromptTable, draw: Draw) -> tuple[Inputs, PyTree]:
    """What a chain is run on, and the reward inputs of the same samples."""
    start_keys, chain_keys = jax.vmap(jax.random.split, out_axes=1)(draw.keys)
    encoded, reward_inputs = prompts.rows(draw.indices)
    start = jax.vmap(generator.start)(start_keys)
    return Inputs(start, encoded, prompts.negative, chain_keys), reward_inputs


def count_microbatches(batch_size: int, microbatch_size: int) -> int:
    """How many microbatches a batch has, 1 for size 0; UserError unless they are of one size."""
    microbatch_size = microbatch_size or batch_size
    if batch_size % microbatch_size:
        raise UserError(
            f"train.microbatch_size is {microbatch_size}; it must divide the images of an update, "
            f"{batch_size}"
        )
    return batch_size // microbatch_size


def reward_metrics(scores: Float[Array, " b"], parts: dict[str, Float[Array, " b"]]) -> Metrics:
    """reward_mean and reward_std over a batch, and reward/NAME for the mean of each part."""
    return {
        "reward_mean": jnp.mean(scores),
        "reward_std": jnp.std(scores),
        **{f"reward/{name}": jnp.mean(part) for name, part in parts.items()},
    }
