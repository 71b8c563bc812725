"""What a config describes, as the objects that do it."""

import optax
from ml_collections import ConfigDict

from alignprop_jax.algorithms.backpropagation import Backpropagation
from alignprop_jax.algorithms.base import Algorithm
from alignprop_jax.algorithms.ddpo import DDPO
from alignprop_jax.algorithms.losses import make_loss
from alignprop_jax.algorithms.optimizer import make_optimizer
from alignprop_jax.algorithms.presets import WITHOUT_REWARD_GRADIENT
from alignprop_jax.algorithms.rwr import RWR
from alignprop_jax.config import gradient_path
from alignprop_jax.lora.adapters import Adaptation, AllWeights, Lora


def algorithm_of(config: ConfigDict) -> Algorithm:
    """How samples and rewards become updates."""
    match config.algorithm:
        case "ddpo":
            return DDPO(**config.rollouts, **config.ddpo)
        case "rwr":
            return RWR(**config.rollouts, **config.rwr)
    return Backpropagation(gradient_path(config), make_loss(**config.loss))


def at_a_time(config: ConfigDict) -> tuple[int, int]:
    """How many samples of an update are in memory at a time, and `mesh.fsdp`.

    It is asked before the config is validated: devices have to be counted first.
    """
    samples = config.train.microbatch_size or config.train.batch_size
    if config.algorithm in WITHOUT_REWARD_GRADIENT:
        samples //= max(1, config.rollouts.minibatches)
    return samples, config.mesh.fsdp


def adaptation_of(config: ConfigDict) -> Adaptation:
    """What is trained: factors of low rank or, of rank 0, all weights."""
    lora = config.lora
    return Lora(lora.rank, lora.alpha, lora.targets) if lora.rank else AllWeights()


def optimizer_of(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of what is trained."""
    settings = config.train
    return make_optimizer(
        settings.learning_rate,
        weight_decay=settings.weight_decay,
        beta1=settings.beta1,
        beta2=settings.beta2,
        epsilon=settings.epsilon,
        max_grad_norm=settings.max_grad_norm,
    )
