"""Whole samples and their gradients against diffusers in PyTorch, and what truncation cuts."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from alignprop_jax.core.gate import gate_gradient
from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.nn.execution import Execution
from alignprop_jax.processes.ddim import DDIMScheduler
from tests.chains import make_sample
from tests.torch_gradients import (
    assert_close_gradients,
    cotangent,
    draw_inputs,
    random_factors,
    to_torch,
    torch_lora,
)
from tests.torch_pipeline import build_torch_pipeline, torch

PROMPTS = ["a cat", "three dogs"]
NEGATIVE = "a blurry fox"
NUM_STEPS = 4
GUIDANCE = 3.0


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder, diffusers' pipeline of it and ours."""
    folder = tmp_path_factory.mktemp("pipeline")
    peer = build_torch_pipeline(folder)
    sd, params, (tokenizer,) = load_stable_diffusion(folder)
    return peer, sd, params, tokenizer


@pytest.fixture(scope="module")
def inputs(pipeline):
    """Latents, encoded prompts and encoded negative prompt."""
    _, sd, params, tokenizer = pipeline
    return draw_inputs(sd, params, tokenizer, PROMPTS, NEGATIVE)


@pytest.fixture(scope="module")
def lora(pipeline):
    return random_factors(pipeline[2]["unet"])


def eta_noise(keys, num_steps, shape):
    """The noise of each step, by the definition in the sampler's docstring: one stream an image."""
    return [
        jnp.stack([jax.random.normal(jax.random.fold_in(key, step), shape) for key in keys])
        for step in range(num_steps)
    ]


@pytest.mark.parametrize(
    ("guidance", "eta", "scheduler"),
    [
        (GUIDANCE, 0.0, {}),
        (GUIDANCE, 1.0, {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
        (1.0, 0.0, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ],
)
def test_sample_equals_diffusers_pipeline(pipeline, inputs, monkeypatch, guidance, eta, scheduler):
    peer, sd, params, _ = pipeline
    latents, context, uncond = inputs
    config = {**peer.scheduler.config, **scheduler}
    # What diffusers lists here it resets, even if it is set.
    del config["_use_default_values"]
    monkeypatch.setattr(peer, "scheduler", peer.scheduler.from_config(config))
    sd = dataclasses.replace(sd, scheduler=DDIMScheduler.from_config(config))
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    if eta:
        noises = iter(eta_noise(keys, NUM_STEPS, sd.latent_shape))
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddim.randn_tensor",
            lambda *args, **kwargs: to_torch(next(noises)),
        )
    wanted = peer(
        PROMPTS,
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        num_inference_steps=NUM_STEPS,
        guidance_scale=guidance,
        eta=eta,
        latents=to_torch(latents),
        output_type="np",
    ).images
    sample = jax.jit(make_sample(sd, NUM_STEPS, guidance, eta))
    images = sample(params, None, latents, context, uncond, keys)
    assert images.dtype == jnp.float32
    assert 0 < np.mean((wanted > 0) & (wanted < 1))
    np.testing.assert_allclose(images, wanted, rtol=0, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch(pipeline, inputs):
    _, sd, params, _ = pipeline
    latents, context, uncond = inputs
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    sample = jax.jit(make_sample(sd, 2, GUIDANCE, eta=1.0))
    both = sample(params, None, latents, context, uncond, keys)
    alone = sample(params, None, latents[1:], context[1:], uncond, keys[1:])
    np.testing.assert_allclose(both[1:], alone, rtol=0, atol=1e-4)
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_the_lora_is_on_between_two_timesteps_alone(pipeline, inputs, lora):
    _, sd, params, _ = pipeline
    sample = jax.jit(make_sample(sd, NUM_STEPS, GUIDANCE))

    def images(lora, *timesteps):
        return sample(params, lora, *inputs, jax.random.key(0), adapter_timesteps=timesteps or None)

    base, plain = images(None), images(lora)
    programs = sample._cache_size()
    np.testing.assert_allclose(images(lora, 1000, 0), plain, rtol=0, atol=1e-6)
    np.testing.assert_allclose(images(lora, 1000, 1000), base, rtol=0, atol=1e-6)
    # The steps are at timesteps 751, 501, 251 and 1.
    early = images(lora, 751, 501)
    np.testing.assert_array_equal(early, images(lora, 1000, 252))
    for narrower in (images(lora, 750, 501), images(lora, 751, 502)):
        assert np.abs(narrower - early).max() > 1e-3
    assert np.abs(early - plain).max() > 1e-3
    assert sample._cache_size() == programs + 1


def torch_chain(peer, unet, trained, latents, context, uncond):
    """The chain by PyTorch autograd: diffusers' UNet, scheduler and decoder, gates by detach."""
    x = to_torch(latents)
    both = torch.from_numpy(
        np.concatenate([np.repeat(uncond.hidden_states, len(x), 0), context.hidden_states])
    )
    peer.scheduler.set_timesteps(len(trained))
    for timestep, is_trained in zip(peer.scheduler.timesteps, trained, strict=True):
        unconditional, conditional = unet(torch.cat([x, x]), timestep, both).sample.chunk(2)
        output = unconditional + GUIDANCE * (conditional - unconditional)
        output = output if is_trained else output.detach()
        x = peer.scheduler.step(output, timestep, x).prev_sample
    images = peer.vae.decode(x / peer.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def torch_gradient(pipeline, inputs, lora):
    """Gradient of the linear reward by every factor, given the gates, by PyTorch."""
    peer = pipeline[0]
    unet = copy.deepcopy(peer.unet)
    factors = torch_lora(unet, lora)

    def gradient(trained):
        for factor in factors.values():
            factor.grad = None
        images = torch_chain(peer, unet, trained, *inputs)
        (images * torch.from_numpy(cotangent(images))).sum().backward()
        return {path: factor.grad.numpy() for path, factor in factors.items()}

    return gradient


@pytest.fixture(scope="module", params=["step", "partial", "none", "block"])
def reward_gradient(request, pipeline, inputs, lora):
    """The same gradient by the sampler, compiled once for all gates."""
    _, sd, params, _ = pipeline
    execution = Execution(remat=request.param == "block")
    modules = {name: getattr(sd, name).clone(execution=execution) for name in ("unet", "vae")}
    sd = dataclasses.replace(sd, **modules)
    sample = make_sample(sd, NUM_STEPS, GUIDANCE, remat=request.param)

    @jax.jit
    def value_and_gradient(lora, latents, trained):
        def reward(lora, latents):
            images = sample(params, lora, latents, *inputs[1:], jax.random.key(0), trained)
            return jnp.sum(images * cotangent(images))

        return jax.value_and_grad(reward, argnums=(0, 1))(lora, latents)

    def at(trained, lora=lora):
        return value_and_gradient(lora, inputs[0], jnp.asarray(trained, bool))

    return at


@pytest.mark.parametrize(
    "trained",
    [(1, 1, 1, 1), (0, 0, 1, 1), (1, 0, 1, 0), (0, 1, 0, 0)],
    ids=["full", "suffix", "scattered", "one"],
)
def test_gradient_equals_pytorch_autograd(reward_gradient, torch_gradient, trained):
    _, (gradient, _) = reward_gradient(trained)
    wanted = torch_gradient(trained)
    for path, value in wanted.items():
        assert np.abs(value).max() > 0, path
    assert_close_gradients(flatten_dict(gradient), wanted)


def test_what_is_cut_has_no_gradient_at_all(reward_gradient, lora):
    value, (gradient, latents_gradient) = reward_gradient((0, 0, 0, 0))
    for path, leaf in flatten_dict(gradient).items():
        assert not np.any(leaf), path
    # The latents cross every step along DDIM's linear terms all the same.
    assert np.all(np.abs(latents_gradient).max(axis=(1, 2, 3)) > 0)
    # Gates have no say in the sample itself.
    assert value == reward_gradient((1, 1, 1, 1))[0]


def test_gradient_equals_finite_differences(reward_gradient, lora):
    """Along one random direction in the factors, by a central difference."""
    leaves, structure = jax.tree.flatten(lora)
    rng = np.random.default_rng(6)
    direction = [rng.standard_normal(leaf.shape, dtype=np.float32) for leaf in leaves]

    def reward(distance):
        moved = [leaf + distance * d for leaf, d in zip(leaves, direction, strict=True)]
        return np.float64(reward_gradient((1, 1, 1, 1), structure.unflatten(moved))[0])

    distance = 1e-3
    wanted = (reward(distance) - reward(-distance)) / (2 * distance)
    _, (gradient, _) = reward_gradient((1, 1, 1, 1))
    actual = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), direction, strict=True))
    np.testing.assert_allclose(actual, wanted, rtol=1e-2)


@pytest.mark.parametrize("remat", ["step", "partial", "none"])
@pytest.mark.parametrize("may_stop", [False, True])
def test_closed_gates_evaluate_nothing(remat, may_stop):
    evaluations = []

    def denoise(lora, x, constants):
        jax.debug.callback(lambda _: evaluations.append("forward"), x)

        @jax.custom_vjp
        def observed(y):
            return y

        def backward(_, cotangent):
            jax.debug.callback(lambda _: evaluations.append("backward"), cotangent)
            return (cotangent,)

        observed.defvjp(lambda y: (y, None), backward)
        return observed(x * lora * constants)

    gated = gate_gradient(denoise, remat)

    @jax.jit
    def gradient(gates, runs, lora):
        def chain(lora):
            def step(x, inputs):
                gate, runs = inputs
                if not may_stop:
                    return gated(gate, lora, x, 0.5), None
                return jnp.where(runs, gated(gate, lora, x, 0.5, runs), x), None

            return jax.lax.scan(step, 1.0, (gates, runs))[0]

        return jax.grad(chain)(lora)

    runs = jnp.array([1, 1, 1, 1, 1, 0, 0] if may_stop else [1] * 5, bool)
    gates = jnp.array([0, 0, 0, 1, 1, 0, 0], bool)[: len(runs)]
    expected_forward = 5 + 2 if remat != "none" or may_stop else 5
    value = gradient(gates, runs, 3.0)
    jax.effects_barrier()
    assert evaluations.count("forward") == expected_forward
    assert evaluations.count("backward") == 2
    # x_5 = x_3 (lora / 2)^2 with x_3 a constant.
    np.testing.assert_allclose(value, 1.5**3 * 2 * 3.0 / 4, rtol=1e-6)
    assert gradient._cache_size() == 1
    gradient(runs, runs, 3.0)
    assert gradient._cache_size() == 1


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "partial", "step"])
def test_nothing_is_kept_of_steps_that_are_never_trained(
    pipeline, inputs, lora, torch_gradient, remat
):
    _, sd, params, _ = pipeline
    sample = make_sample(sd, NUM_STEPS, GUIDANCE, remat=remat)
    trained, never_trained = (0, 0, 0, 1), 3

    def reward(lora):
        at = jnp.asarray(trained, bool)
        key = jax.random.key(0)
        images = sample(params, lora, *inputs, key, at, never_trained=never_trained)
        return jnp.sum(images * cotangent(images))

    assert_close_gradients(flatten_dict(jax.jit(jax.grad(reward))(lora)), torch_gradient(trained))
    equations = jax.make_jaxpr(jax.grad(reward))(lora).eqns
    forward = [
        (equation.params["length"], equation.params["num_carry"], len(equation.outvars))
        for equation in equations
        if equation.primitive.name == "scan" and not equation.params["reverse"]
    ]
    if remat == "step":  # What is kept is next to nothing, and one loop compiles sooner.
        assert [length for length, *_ in forward] == [NUM_STEPS]
        return
    (apart, carried, given), (kept, _, _) = forward
    assert (apart, kept) == (never_trained, 1)
    assert given == carried  # and nothing is stacked


@pytest.mark.parametrize(
    "remat, method, more",
    # An early stop has every step evaluated again, whatever remat says.
    [
        ("step", "sample", ()),
        ("step", "sample_with_copies", (2,)),
        ("step", "sample_until", (3,)),
        ("none", "sample_until", (3,)),
    ],
)
def test_step_remat_keeps_latents_only(pipeline, inputs, lora, remat, method, more):
    """Per step, the backward pass is left the latents and a few numbers, none of the weights."""
    _, sd, params, _ = pipeline
    latents, context, uncond = inputs
    num_steps, with_copies = 7, method == "sample_with_copies"
    num_rows = num_steps + (more[0] if with_copies else 0)
    sample = make_sample(sd, num_steps, GUIDANCE, remat=remat)

    def reward(lora, trained):
        key = jax.random.key(0)
        arguments = (latents, context, uncond, key, trained, *more)
        return jnp.sum(sample(params, lora, *arguments, method=method))

    jaxpr = jax.make_jaxpr(jax.grad(reward))(lora, jnp.ones(num_steps, bool))
    (forward,) = (
        equation
        for equation in jaxpr.eqns
        if equation.primitive.name == "scan" and not equation.params["reverse"]
    )
    stacked = [
        variable.aval.size
        for variable in forward.outvars
        if variable.aval.ndim and variable.aval.shape[0] == num_rows
    ]
    # Copies are themselves among what the steps give.
    assert 0 < sum(stacked) <= (2 + with_copies) * num_rows * latents.size


def test_decoded_images_are_clipped_and_so_is_their_gradient(pipeline):
    _, sd, params, _ = pipeline
    latents = 3 * jax.random.normal(jax.random.key(7), (1, *sd.latent_shape))

    @jax.jit
    def decode(latents):
        return sd.finish(params, latents)

    decoded = sd.vae.apply(
        {"params": params["vae"]}, latents / sd.vae.config.scaling_factor, method="decode"
    )
    outside = jnp.abs(decoded) > 1
    assert np.any(outside) and not np.all(outside)
    images, vjp = jax.vjp(decode, latents)
    assert images.min() == 0
    assert images.max() == 1
    (gradient,) = vjp(outside.astype(jnp.float32))
    assert not np.any(gradient)


def test_refuses_what_it_cannot_sample(pipeline):
    sd = pipeline[1]
    with pytest.raises(UserError, match="remat is 'blocks'"):
        make_sample(sd, NUM_STEPS, GUIDANCE, remat="blocks")
    with pytest.raises(UserError, match="num_steps is 2000"):
        make_sample(sd, 2000, GUIDANCE)


def test_half_precision_stays_finite_and_near(tmp_path):
    """Stable Diffusion 2 overflows float16; bfloat16 has the range of float32."""
    build_torch_pipeline(tmp_path, "sd2")
    images = {}
    for dtype in ("float32", "bfloat16"):
        sd, params, (tokenizer,) = load_stable_diffusion(tmp_path, Execution(jnp.dtype(dtype)))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        arguments = draw_inputs(sd, params, tokenizer, PROMPTS, NEGATIVE)
        sample = jax.jit(make_sample(sd, NUM_STEPS, GUIDANCE))
        images[dtype] = np.asarray(sample(params, None, *arguments, jax.random.key(1)))
    assert np.isfinite(images["bfloat16"]).all()
    assert np.abs(images["bfloat16"] - images["float32"]).mean() < 0.02
