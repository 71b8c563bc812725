"""What an image is worth: differentiable functions of images and prompts."""

from alignprop_jax.rewards import aesthetic as aesthetic  # each registers itself
from alignprop_jax.rewards import clip_similarity as clip_similarity
from alignprop_jax.rewards import count as count
from alignprop_jax.rewards import hps as hps
from alignprop_jax.rewards import jpeg as jpeg
from alignprop_jax.rewards import jpeg_file as jpeg_file
from alignprop_jax.rewards import remove as remove
from alignprop_jax.rewards.base import Reward, check_reward
from alignprop_jax.rewards.registry import make_reward, register

__all__ = ["Reward", "check_reward", "make_reward", "register"]
