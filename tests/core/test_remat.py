"""What is kept for the backward pass: by the memory there is, and as much as was counted on."""

import os

import jax
import jax.numpy as jnp
import pytest

from alignprop_jax.core.jaxprs import inner_jaxprs
from alignprop_jax.core.remat import bytes_kept_of, choose_remat, device_memory
from alignprop_jax.devices import sharding
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.generators.stable_diffusion.prompts import encode
from tests.chains import make_sample
from tests.torch_gradients import random_factors
from tests.torch_pipeline import build_torch_pipeline, build_torch_xl_pipeline

PROMPTS, NUM_STEPS, GUIDANCE = ["a cat", "three dogs"], 5, 3.0
NUM_IMAGES = 2 * len(PROMPTS)


@pytest.fixture(scope="module", params=[build_torch_pipeline, build_torch_xl_pipeline])
def model(request, tmp_path_factory):
    """A pipeline with transformers of one layer, and one that has two in the deepest."""
    return build_model(request.param, tmp_path_factory.mktemp("pipeline"))


def build_model(build, folder):
    """The modules, their weights, and the encoded prompts after the negative one."""
    build(folder)
    sd, params, tokenizers = load_stable_diffusion(folder)
    return sd, params, encode(sd, params, tokenizers, ["", *PROMPTS])


def trace_gradient(model, remat):
    """The gradient of a whole sample by the factors."""
    sd, params, encoded = model
    sample = make_sample(sd, NUM_STEPS, GUIDANCE, remat=remat)
    latents = jnp.zeros((len(PROMPTS), *sd.latent_shape))

    def reward(lora):
        trained = jnp.ones(NUM_STEPS, bool)
        key = jax.random.key(0)
        return sample(params, lora, latents, encoded[1:], encoded[:1], key, trained).sum()

    return jax.make_jaxpr(jax.grad(reward))(random_factors(params["unet"])).jaxpr


def scans(jaxpr, length):
    """The loops of so many turns, those within others, too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan" and eqn.params["length"] == length:
            yield eqn
        for inner in inner_jaxprs(eqn):
            yield from scans(inner, length)


def bytes_given(scan):
    """What the turns of a loop leave behind, one by one."""
    arrays = [v.aval for v in scan.outvars[scan.params["num_carry"] :]]
    return sum(array.size * array.dtype.itemsize for array in arrays)


def test_what_is_kept_is_what_room_was_made_for(model):
    sd, params, encoded = model
    counted = (
        NUM_STEPS * NUM_IMAGES * bytes_kept_of(sd.on_one_device(), params["unet"], encoded[:1])
    )
    # What the forward pass of a whole sample hands to its backward pass, step by step.
    forward, backward = scans(trace_gradient(model, "partial"), NUM_STEPS)
    assert backward.params["reverse"] and not forward.params["reverse"]
    # What guidance's two halves share is kept once, and was counted twice; latents are kept, too.
    assert 0.75 * counted < bytes_given(forward) < 1.1 * counted


def test_blocks_keep_what_goes_between_layers_in_a_loop_and_attention(tmp_path):
    """Of a transformer of 4 x 4 pixels, 32 channels and 4 heads; no weights, and no other sums."""
    sd, *rest = build_model(build_torch_xl_pipeline, tmp_path)
    model = sd.rematerialized(), *rest
    forward = [s for s in scans(trace_gradient(model, "block"), 2) if not s.params["reverse"]]
    tokens, features, heads = NUM_IMAGES * 16, 32, 4
    a_layer = (tokens * features) + 2 * (tokens * features + tokens * heads)
    assert {bytes_given(scan) for scan in forward} == {0, 2 * 4 * a_layer}


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
