"""DDPO and RWR: losses and gradients by PyTorch, written from the papers, and whole runs."""

import collections
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from alignprop_jax.algorithms.advantages import PromptHistory
from alignprop_jax.algorithms.base import PromptTable
from alignprop_jax.algorithms.ddpo import DDPO
from alignprop_jax.algorithms.presets import use_algorithm
from alignprop_jax.algorithms.rollouts import Rollouts
from alignprop_jax.algorithms.rwr import RWR
from alignprop_jax.config import load_config
from alignprop_jax.core.chain import Chain
from alignprop_jax.generators.stable_diffusion.generator import StableDiffusion
from alignprop_jax.lora.adapters import Factors
from alignprop_jax.processes.ddim import DDIMScheduler
from alignprop_jax.train import train
from tests import nano_run
from tests.chains import make_sample
from tests.torch_gradients import (
    assert_close_gradients,
    build_both_sides,
    to_torch,
)
from tests.torch_pipeline import diffusers, torch

NUM_STEPS, GUIDANCE, CLIP = 3, 2.0, 0.05
PROMPTS = ["a cat", "three dogs"]
LORA_FILES = ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The peer's pipeline and UNet with factors in it, ours, and a trajectory of ours."""
    both = build_both_sides(tmp_path_factory.mktemp("pipeline"), PROMPTS, NUM_STEPS)
    *model, latents, conditioning, uncond, keys = both
    sd, params, lora = model[3:]
    sample = jax.jit(make_sample(sd, NUM_STEPS, GUIDANCE, eta=1.0), static_argnames="method")
    arguments = (params, lora, latents, conditioning, uncond, keys)
    trajectory = sample(*arguments, method="sample_trajectory")
    np.testing.assert_allclose(trajectory.samples, sample(*arguments), atol=1e-6)
    np.testing.assert_array_equal(trajectory.states[:, 0], latents)
    table = PromptTable(conditioning, uncond, np.zeros((len(PROMPTS), 0)))
    return *model, table, trajectory


def chain_of(sd, guidance_scale):
    """The chain that the trajectory is of."""
    return Chain(sd, NUM_STEPS, sd.guidance(guidance_scale, shared=False), eta=1.0)


def gaussians_of_peer(peer, eps, x, index):
    """Mean and deviation of diffusers' own step with eta = 1: two of its draws tell both."""
    timestep = peer.scheduler.timesteps[index]
    still, moved = (
        peer.scheduler.step(eps, timestep, x, eta=1.0, variance_noise=noise).prev_sample
        for noise in (torch.zeros_like(x), torch.ones_like(x))
    )
    return still, (moved - still).mean().detach()


def test_log_probabilities_are_those_of_diffusers_steps(setting):
    peer, unet, _, _, _, _, table, trajectory = setting
    latents = np.array(trajectory.states)
    for index in range(NUM_STEPS):
        x, x_prev = to_torch(latents[:, index]), to_torch(latents[:, index + 1])
        eps = guided(unet, peer, table, x, index)
        density = torch.distributions.Normal(*gaussians_of_peer(peer, eps, x, index))
        wanted = density.log_prob(x_prev).mean((1, 2, 3)).detach()
        np.testing.assert_allclose(trajectory.log_probs[:, index], wanted, rtol=2e-4)


def guided(unet, peer, table, x, index):
    negative = np.repeat(table.negative.hidden_states, len(x), 0)
    both = torch.from_numpy(np.concatenate([negative, table.encoded.hidden_states]))
    output = unet(torch.cat([x, x]), peer.scheduler.timesteps[index], both).sample
    unconditional, conditional = output.chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


def test_a_step_without_noise_counts_for_nothing():
    scheduler = DDIMScheduler(set_alpha_to_one=True)
    last = jax.tree.map(lambda x: x[-1], scheduler.plan(4, eta=1.0))
    assert last.sigma == 0
    x = jnp.ones((2, 2, 1))
    value, gradient = jax.value_and_grad(scheduler.log_prob)(x, x, 2 * x, last)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_ddpo_descends_ppos_clipped_loss(setting):
    peer, unet, factors, sd, params, lora, table, trajectory = setting
    # As if sampled by another policy: some weights are out of range, on either side.
    shifts = np.array([[0.02, 0.2, -0.2], [-0.02, -0.2, 0.2]], np.float32)
    advantages = np.array([1.5, -0.5], np.float32)
    old = np.asarray(trajectory.log_probs) + shifts
    fit = DDPO(1, 1, 1, CLIP, max_advantage=5.0).fit(chain_of(sd, GUIDANCE))
    rollouts = Rollouts(np.arange(2), None, trajectory.states, old, advantages)

    def objective(lora):
        losses, extras = fit.loss(params, table, Factors(lora), fit.expand(rollouts, 0))
        return losses.mean(), extras

    (value, extras), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(lora)
    np.testing.assert_array_equal(extras["clipped"], (np.abs(shifts) > CLIP).ravel())

    losses = []
    latents = np.array(trajectory.states)
    for index in range(NUM_STEPS):
        x, x_prev = to_torch(latents[:, index]), to_torch(latents[:, index + 1])
        eps = guided(unet, peer, table, x, index)
        density = torch.distributions.Normal(*gaussians_of_peer(peer, eps, x, index))
        log_prob = density.log_prob(x_prev).mean((1, 2, 3))
        ratio = torch.exp(log_prob - torch.from_numpy(old[:, index]))
        weight = torch.from_numpy(advantages)
        losses.append(-torch.min(ratio * weight, ratio.clamp(1 - CLIP, 1 + CLIP) * weight))
    loss = torch.stack(losses).mean()
    for factor in factors.values():
        factor.grad = None
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-4)
    wanted = {path: factor.grad.numpy() for path, factor in factors.items()}
    # What a step added is a small difference of latents, and rounded as they are.
    assert_close_gradients(flatten_dict(gradient), wanted, atol=5e-4)


def test_ddpos_gradient_is_that_of_the_expected_reward():
    """By many samples of one number each, whose reward can be differentiated along the way, too."""
    # All steps have noise worth the name, the last one, too: the estimate would vary otherwise.
    scheduler = DDIMScheduler(
        num_train_timesteps=20,
        beta_start=0.1,
        beta_end=0.2,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="sample",
    )
    number, steps = 200_000, jax.tree.map(jnp.asarray, scheduler.plan(4, eta=1.0))
    noise = jax.random.normal(jax.random.key(7), (5, number, 1, 1, 1))

    def denoise(lora, x_t):
        return jnp.tanh(lora * x_t) + 0.3 * lora

    class Toy(StableDiffusion):
        """A network of one number, which the adapter is."""

        def predict(self, weights, adapter, state, at, prompts):
            return denoise(adapter, state)

    vae = SimpleNamespace(config=SimpleNamespace(downscale=1))
    toy = Toy(SimpleNamespace(config=SimpleNamespace(channels=(1,))), vae, (), scheduler)

    def walk(lora):
        """The latents, and each step's log-density."""

        def step(x_t, inputs):
            at, noise = inputs
            output = denoise(lora, x_t)
            x_prev = scheduler.step(output, x_t, at, noise)
            log_probs = jax.vmap(scheduler.log_prob, (0, 0, 0, None))(output, x_t, x_prev, at)
            return x_prev, (x_prev, log_probs)

        x_0, (after, log_probs) = jax.lax.scan(step, noise[0], (steps, noise[1:]))
        latents = jnp.concatenate([noise[:1], after]).swapaxes(0, 1)
        return jnp.sin(x_0.ravel()), latents, log_probs.T

    lora = jnp.float32(0.7)
    rewards, latents, log_probs = walk(lora)
    along_the_way = jax.grad(lambda lora: walk(lora)[0].mean())(lora)
    chain = Chain(toy, 4, toy.guidance(1.0), eta=1.0)
    fit = DDPO(1, 1, 1, clip_range=1e-4, max_advantage=100.0).fit(chain)
    zeros = np.zeros(number, np.int32)
    advantages = (rewards - rewards.mean()) / rewards.std()
    rollouts = Rollouts(zeros, None, latents, log_probs, advantages)
    table = PromptTable(jnp.zeros(1), jnp.zeros(1), np.zeros((1, 0)))

    def objective(lora):
        losses, _ = fit.loss({"unet": jnp.zeros(())}, table, lora, fit.expand(rollouts, 0))
        return losses.mean()

    # The loss is a mean over the steps, of advantages in standard deviations.
    by_scores = -4 * rewards.std() * jax.grad(objective)(lora)
    assert abs(along_the_way) > 0.1
    np.testing.assert_allclose(by_scores, along_the_way, rtol=0.03)


def draw_time_and_noise(key, shape):
    """What the loss draws from the key of an example, by the definition in its docstring."""
    time_key, noise_key = jax.random.split(key)
    return jax.random.randint(time_key, (), 0, 1000), jax.random.normal(noise_key, shape)


def test_rwr_descends_the_weighted_diffusion_loss(setting):
    peer, unet, factors, sd, params, lora, table, trajectory = setting
    fit = RWR(1, 1, 1, temperature=0.5).fit(chain_of(sd, GUIDANCE))
    advantages = jnp.array([1.0, -1.0])
    weights = fit.weigh(advantages)
    np.testing.assert_allclose(weights, 2 * torch.tensor([2.0, -2.0]).softmax(0), rtol=1e-6)
    keys = jax.random.split(jax.random.key(9), 2)
    latents = trajectory.states[:, -1]
    rollouts = Rollouts(np.arange(2), keys, trajectory.states, None, weights)
    examples, other = fit.expand(rollouts, 0), fit.expand(rollouts, 1)
    assert not (jax.random.key_data(examples["keys"]) == jax.random.key_data(other["keys"])).any()

    def objective(lora):
        losses, _ = fit.loss(params, table, Factors(lora), examples)
        return losses.mean()

    value, gradient = jax.jit(jax.value_and_grad(objective))(lora)
    drawn = [draw_time_and_noise(key, latents.shape[1:]) for key in examples["keys"]]
    timesteps = torch.tensor([int(timestep) for timestep, _ in drawn])
    noise = to_torch(jnp.stack([noise for _, noise in drawn]))
    x_0 = to_torch(latents)
    x_t = peer.scheduler.add_noise(x_0, noise, timesteps)
    eps = unet(x_t, timesteps, torch.from_numpy(np.array(table.encoded.hidden_states))).sample
    errors = torch.nn.functional.mse_loss(eps, noise, reduction="none").mean((1, 2, 3))
    loss = (torch.from_numpy(np.array(weights)) * errors).mean()
    for factor in factors.values():
        factor.grad = None
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-4)
    wanted = {path: factor.grad.numpy() for path, factor in factors.items()}
    assert_close_gradients(flatten_dict(gradient), wanted)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_what_predicts_the_sample(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    peer = diffusers.DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    x_0, noise = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    alpha_bar = scheduler.alpha_bar[300]
    target = scheduler.training_target(x_0, noise, alpha_bar)
    x_t = scheduler.add_noise(x_0, noise, alpha_bar)
    if prediction_type == "v_prediction":
        velocity = peer.get_velocity(*map(torch.from_numpy, (x_0, noise)), torch.tensor(300))
        np.testing.assert_allclose(target, velocity, atol=1e-6)
    for got, wanted in zip(scheduler.predict(target, x_t, alpha_bar), (x_0, noise), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_advantages_are_against_the_last_rewards_of_the_prompt():
    """Against a deque for each prompt, over several batches with repeated prompts."""
    rng, size = np.random.default_rng(1), 3
    history, peer = PromptHistory.create(4, size), [collections.deque(maxlen=size) for _ in "pqrs"]
    for _ in range(5):
        indices = rng.integers(0, 4, 6)
        rewards = rng.standard_normal(6).astype(np.float32)
        history = history.add(indices, rewards)
        for index, reward in zip(indices, rewards, strict=True):
            peer[index].append(reward)
        wanted = []
        for index, reward in zip(indices, rewards, strict=True):
            others = np.array(peer[index]) if len(peer[index]) == size else rewards
            wanted.append((reward - others.mean()) / (others.std() + 1e-6))
        np.testing.assert_allclose(history.advantages(indices, rewards), wanted, atol=1e-4)


def nano_config_of(nano_config, algorithm, num_steps):
    config = load_config(str(nano_config))
    use_algorithm(config, algorithm)
    config.reward = "jpeg_compress_file"
    config.train.num_steps = num_steps
    config.rollouts.history = 2
    return config


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ddpo", "rwr"])
def test_a_resumed_run_of_a_black_box_reward_ends_where_a_whole_one_does(
    nano_config, tmp_path, algorithm
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(nano_config_of(nano_config, algorithm, 4), whole)
    for num_steps in (2, 4):
        train(nano_config_of(nano_config, algorithm, num_steps), parts)
    records = [nano_run.read_records(folder / "metrics.jsonl") for folder in (whole, parts)]
    assert records[0] == records[1]
    assert all(record["grad_norm"] > 0 for record in records[0])
    for name in LORA_FILES:
        trained, again = (load_file(folder / "lora" / name) for folder in (whole, parts))
        assert trained.keys() == again.keys()
        for tensor, wanted in trained.items():
            np.testing.assert_array_equal(again[tensor], wanted)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["reward_queries"] == 8
