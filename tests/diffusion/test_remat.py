"""What is kept for the backward pass: by the memory there is, and as much as was counted on."""

import os

import jax
import jax.numpy as jnp
import pytest

from alignprop_jax.devices import sharding
from alignprop_jax.diffusion.remat import bytes_kept_of, choose_remat, device_memory
from alignprop_jax.diffusion.sampling import make_sampler
from alignprop_jax.loading.pretrained import load_stable_diffusion
from tests.torch_gradients import draw_inputs, random_factors
from tests.torch_pipeline import build_torch_pipeline

PROMPTS, NUM_STEPS, GUIDANCE = ["a cat", "three dogs"], 5, 3.0
NUM_IMAGES = 2 * len(PROMPTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    build_torch_pipeline(folder)
    sd, params, (tokenizer,) = load_stable_diffusion(folder)
    return sd, params, draw_inputs(sd, params, tokenizer, PROMPTS, "")


def bytes_kept(model):
    """What the forward pass of a whole sample hands to its backward pass, step by step."""
    sd, params, (latents, conditioning, uncond) = model
    sample = make_sampler(sd, NUM_STEPS, GUIDANCE, remat="partial")

    def reward(lora):
        trained = jnp.ones(NUM_STEPS, bool)
        key = jax.random.key(0)
        return sample(params, lora, latents, conditioning, uncond, key, trained).sum()

    jaxpr = jax.make_jaxpr(jax.grad(reward))(random_factors(params["unet"]))
    (forward,) = (
        eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and not eqn.params["reverse"]
    )
    stacked = (v.aval for v in forward.outvars if v.aval.shape[:1] == (NUM_STEPS,))
    return sum(array.size * array.dtype.itemsize for array in stacked)


def test_what_is_kept_is_what_room_was_made_for(model):
    sd, params, (_, conditioning, _) = model
    counted = NUM_STEPS * NUM_IMAGES * bytes_kept_of(sd, params["unet"], conditioning[:1])
    # What guidance's two halves share is kept once, and was counted twice; latents are kept, too.
    assert 0.75 * counted < bytes_kept(model) < 1.1 * counted


@pytest.mark.parametrize(
    "num_kept, trained_steps, memory, policy",
    [
        (50, 50, None, "block"),
        (50, 25, 10_000, "partial"),
        (50, 25, 9_999, "step"),
        (50, 25, 1_600, "step"),
        (50, 25, 1_599, "block"),
        (5, 5, 1_599, "partial"),
        (5, 1, 1_600, "step"),
    ],
)
def test_less_is_kept_where_there_is_less_memory(num_kept, trained_steps, memory, policy):
    """Of 100 bytes a step, and eight times that for all activations, in half of the memory."""
    assert choose_remat(100, num_kept, trained_steps, memory) == policy


def test_the_devices_of_a_cpu_share_its_memory():
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert device_memory(sharding.make_mesh()) == whole // jax.local_device_count()
