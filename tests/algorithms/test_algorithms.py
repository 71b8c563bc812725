"""The named algorithms: gradients by PyTorch from each paper's pseudo-code, and what each costs."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from alignprop_jax.algorithms.presets import PRESETS, WITHOUT_REWARD_GRADIENT, use_algorithm
from alignprop_jax.config import default_config, gradient_path, validate
from alignprop_jax.generators.stable_diffusion.generator import (
    Conditioning,
    StableDiffusion,
)
from alignprop_jax.processes.ddim import DDIMScheduler
from tests.chains import make_sample
from tests.torch_gradients import (
    assert_close_gradients,
    build_both_sides,
    cotangent,
    to_torch,
)
from tests.torch_pipeline import torch

PROMPTS = ["a cat", "three dogs"]
NUM_STEPS = 5
GUIDANCE = 3.0


def path_of(algorithm, num_steps, **overrides):
    """The gradient path of an algorithm, by way of the config."""
    config = default_config()
    config.sampler.num_steps = num_steps
    config.truncation.max = num_steps
    use_algorithm(config, algorithm)
    config.update_from_flattened_dict(overrides)
    validate(config)
    return gradient_path(config)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return build_both_sides(tmp_path_factory.mktemp("pipeline"), PROMPTS, NUM_STEPS)


class Chain:
    """What the papers' pseudo-code is written in: step i counts from 0, the noisiest."""

    def __init__(self, setting):
        self.setting = setting
        self.scheduler = setting.peer.scheduler
        self.x_T = to_torch(setting.latents)
        states = np.repeat(setting.uncond.hidden_states, len(self.x_T), 0)
        self.both = torch.from_numpy(np.concatenate([states, setting.context.hidden_states]))

    def eps(self, x, i):
        unet, timestep = self.setting.unet, self.scheduler.timesteps[i]
        unconditional, conditional = unet(torch.cat([x, x]), timestep, self.both).sample.chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)

    def ddim(self, eps, x, i):
        return self.scheduler.step(eps, self.scheduler.timesteps[i], x).prev_sample

    def predicted(self, eps, x, i):
        return self.scheduler.step(eps, self.scheduler.timesteps[i], x).pred_original_sample

    def decode(self, x):
        vae = self.setting.peer.vae
        images = vae.decode(x / vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def alignprop(chain, path, draw):
    x, start = chain.x_T, np.flatnonzero(draw.trained)[0]
    for i in range(NUM_STEPS):
        eps = chain.eps(x, i)
        x = chain.ddim(eps if i >= start else eps.detach(), x, i)
    return chain.decode(x)


def draft(chain, path, draw):
    x = chain.x_T
    for i in range(NUM_STEPS):
        x = chain.ddim(chain.eps(x, i), x, i)
    return chain.decode(x)


def draft_k(chain, path, draw, k=2):
    x = chain.x_T
    for i in range(NUM_STEPS):
        if i == NUM_STEPS - k:
            x = x.detach()
        x = chain.ddim(chain.eps(x, i), x, i)
    return chain.decode(x)


def draft_lv(chain, path, draw, n=2):
    last = NUM_STEPS - 1
    with torch.no_grad():
        x = chain.x_T
        for i in range(last):
            x = chain.ddim(chain.eps(x, i), x, i)
    x_0 = chain.ddim(chain.eps(x, last), x, last)
    images = [chain.decode(x_0)]
    for copy_index in range(n):
        # One stream of noise an image, past those of the steps.
        index = NUM_STEPS + n + NUM_STEPS + copy_index
        noise = [
            jax.random.normal(jax.random.fold_in(key, index), chain.setting.latents.shape[1:])
            for key in chain.setting.keys
        ]
        timestep = chain.scheduler.timesteps[last:]
        x_1 = chain.scheduler.add_noise(x_0.detach(), to_torch(jnp.stack(noise)), timestep)
        images.append(chain.decode(chain.ddim(chain.eps(x_1, last), x_1, last)))
    return torch.stack(images, dim=1).flatten(0, 1)


def refl(chain, path, draw):
    with torch.no_grad():
        x = chain.x_T
        for i in range(draw.stop):
            x = chain.ddim(chain.eps(x, i), x, i)
    return chain.decode(chain.predicted(chain.eps(x, draw.stop), x, draw.stop))


def drtune(chain, path, draw, k=3):
    stride = NUM_STEPS // k
    t_train = np.flatnonzero(draw.trained)[0] + stride * np.arange(k)
    x = chain.x_T
    for i in range(NUM_STEPS):
        eps = chain.eps(x.detach(), i)
        if i not in t_train:
            eps = eps.detach()
        if i == draw.stop:
            return chain.decode(chain.predicted(eps, x, i))
        x = chain.ddim(eps, x, i)


def draw_with(path, condition):
    """The first draw that is as wanted, as plain numbers."""
    for seed in range(1000):
        draw = jax.device_get(path.draw(jax.random.key(seed), NUM_STEPS))
        if condition(draw):
            return draw._replace(stop=None if draw.stop is None else int(draw.stop))
    raise AssertionError("never drawn")


@functools.cache
def compiled_gradient(detach_input, method, copies, remat):
    """The gradient of the linear reward by the sampler; the draw is data to it."""

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(static, params, lora, latents, context, uncond, keys, draw):
        sample = make_sample(static, NUM_STEPS, GUIDANCE, remat=remat, detach_input=detach_input)

        def reward(lora):
            inputs = (latents, context, uncond, keys)
            images = sample(params, lora, *inputs, *draw, *copies, method=method)
            return jnp.sum(images * cotangent(images)), images

        return jax.grad(reward, has_aux=True)(lora)

    return gradient


def gradient_by_the_sampler(setting, path, draw, remat="step"):
    method, copies = method_of(path, draw)
    gradient = compiled_gradient(path.detach_input, method, copies, remat)
    return gradient(setting.sd, *setting[4:], jax.tree.leaves(draw))


def method_of(path, draw):
    """How the chain is run for a path, and with what besides the draw."""
    if draw.stop is not None:
        return "sample_until", ()
    return ("sample_with_copies", (path.renoise,)) if path.renoise else ("sample", ())


@pytest.mark.parametrize(
    "by_the_paper, overrides, condition",
    [
        (alignprop, {}, lambda draw: not draw.trained[:2].any() and draw.trained[2]),
        (draft, {}, lambda draw: True),
        (draft_k, {"truncation.k": 2}, lambda draw: True),
        (draft_lv, {}, lambda draw: True),
        (refl, {"gradient.stop_share": 0.6}, lambda draw: draw.stop == 2),
        (
            drtune,
            {"truncation.k": 3, "gradient.stop_share": 0.4},
            lambda draw: draw.stop == 3 and tuple(draw.trained) == (1, 1, 1, 0, 0),
        ),
        (
            drtune,
            {"truncation.k": 3, "gradient.stop_share": 0.4},
            lambda draw: draw.stop == 3 and tuple(draw.trained) == (0, 0, 1, 1, 0),
        ),
    ],
    ids=["alignprop", "draft", "draft_k", "draft_lv", "refl", "drtune", "drtune-cut-by-the-stop"],
)
def test_gradient_is_the_papers(setting, by_the_paper, overrides, condition):
    path = path_of(by_the_paper.__name__, NUM_STEPS, **overrides)
    draw = draw_with(path, condition)
    for factor in setting.factors.values():
        factor.grad = None
    images = by_the_paper(Chain(setting), path, draw)
    (images * torch.from_numpy(cotangent(images))).sum().backward()
    gradient, actual_images = gradient_by_the_sampler(setting, path, draw)
    np.testing.assert_allclose(actual_images, images.detach(), rtol=0, atol=1e-4)
    wanted = {name: factor.grad.numpy() for name, factor in setting.factors.items()}
    for name, value in wanted.items():
        assert np.abs(value).max() > 0, name
    assert_close_gradients(flatten_dict(gradient), wanted)


class CountingUNet:
    """Halves its input times a factor, and counts its evaluations both ways."""

    config = SimpleNamespace(channels=(1,))

    def __init__(self):
        self.counts = {"forward": 0, "backward": 0}

    def apply(self, variables, x, *rest):
        @jax.custom_vjp
        def observed(y):
            return y

        def backward(_, cotangent):
            jax.debug.callback(self._count, "backward", cotangent[0, 0, 0, 0])
            return (cotangent,)

        observed.defvjp(lambda y: (y, None), backward)
        jax.debug.callback(self._count, "forward", x[0, 0, 0, 0])
        return observed(0.5 * x * variables["lora"]["all"]["up"])

    def _count(self, way, _):
        self.counts[way] += 1


@pytest.mark.parametrize("remat", ["step", "none"])
@pytest.mark.parametrize(
    "algorithm", [name for name in PRESETS if name not in WITHOUT_REWARD_GRADIENT]
)
def test_what_is_neither_run_nor_trained_costs_nothing(algorithm, remat):
    num_steps = 10
    path = path_of(algorithm, num_steps)
    unet = CountingUNet()
    vae = SimpleNamespace(
        config=SimpleNamespace(scaling_factor=1.0, downscale=1),
        apply=lambda variables, z, method: 0.1 * z,
    )
    sd = StableDiffusion(unet, vae, (), DDIMScheduler(clip_sample=False))
    sample = make_sample(sd, num_steps, remat=remat, detach_input=path.detach_input)
    latents = jax.random.normal(jax.random.key(0), (1, 2, 2, 4))
    prompts = Conditioning(jnp.zeros((1, 3, 4)))
    key, lora = jax.random.key(1), {"all": {"up": 0.7}}

    @jax.jit
    def gradient(lora, draw):
        def reward(lora):
            params = {"unet": {}, "vae": {}}
            method, copies = method_of(path, draw)
            inputs = (latents, prompts, prompts, key)
            images = sample(params, lora, *inputs, *jax.tree.leaves(draw), *copies, method=method)
            return jnp.sum(images)

        return jax.grad(reward)(lora)

    for seed in range(4):
        draw = path.draw(jax.random.key(seed), num_steps)
        unet.counts.update(forward=0, backward=0)
        assert gradient(lora, draw)["all"]["up"] != 0 or not draw.trained.any()
        jax.effects_barrier()
        num_trained = int(draw.trained.sum()) + path.renoise
        num_run = (num_steps if draw.stop is None else int(draw.stop) + 1) + path.renoise
        again = num_trained if remat == "step" or draw.stop is not None else 0
        assert unet.counts == {"forward": num_run + again, "backward": num_trained}
    assert gradient._cache_size() == 1


def test_copies_follow_their_sample_and_leave_it_as_it_is(setting):
    alone, with_copies = (path_of(name, NUM_STEPS) for name in ("draft_k", "draft_lv"))
    draw = draw_with(alone, lambda draw: True)
    (_, images), (_, copied) = (
        gradient_by_the_sampler(setting, path, draw) for path in (alone, with_copies)
    )
    np.testing.assert_allclose(copied[::3], images, rtol=0, atol=1e-6)
    # The last step is at little noise: copies are near their sample, but not it, nor each other.
    own = np.abs(copied.reshape(2, 3, -1) - images.reshape(2, 1, -1)).mean(axis=2)
    other = np.abs(images[0] - images[1]).mean()
    assert np.all(own[:, 1:] < other / 2)
    assert np.abs(copied[1] - copied[2]).max() > 1e-4
