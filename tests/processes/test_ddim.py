"""The DDIM scheduler against diffusers' own, over the grid of its settings."""

import itertools

import jax
import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.processes.ddim import DDIMScheduler

NUM_TRAIN = 200
TRAINED_BETAS = tuple(np.geomspace(1e-3, 0.05, NUM_TRAIN).tolist())
BETAS = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": TRAINED_BETAS},
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")


def peer_scheduler(**config):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    if "trained_betas" in config:
        config["trained_betas"] = list(config["trained_betas"])
    return diffusers.DDIMScheduler(**config)


def peer_steps(peer, num_steps, eta, outputs, noises, x):
    """Every step of diffusers' scheduler from the same sample: timesteps and results."""
    import torch

    # In double precision, where the differences of nearly equal numbers keep their digits.
    peer.alphas_cumprod = peer.alphas_cumprod.double()
    peer.final_alpha_cumprod = peer.final_alpha_cumprod.double()
    peer.set_timesteps(num_steps)
    results = [
        peer.step(
            torch.from_numpy(output).double(),
            timestep,
            torch.from_numpy(x).double(),
            eta=eta,
            variance_noise=torch.from_numpy(noise).double(),
        ).prev_sample.numpy()
        for timestep, output, noise in zip(peer.timesteps, outputs, noises, strict=True)
    ]
    return peer.timesteps.numpy(), results


def our_steps(scheduler, num_steps, eta, outputs, noises, x):
    steps = scheduler.plan(num_steps, eta)
    noises = noises if eta > 0 else None
    results = jax.vmap(scheduler.step, in_axes=(0, None, 0, 0))(outputs, x, steps, noises)
    return steps.timesteps, results


def assert_same_steps(config, num_steps, eta):
    # Rescaled tables differ by PyTorch's rounding of square roots, and 1 - alpha_bar at small t
    # has few digits to begin with.
    tolerance = 5e-4 if config.get("rescale_betas_zero_snr") else 1e-5
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, 2, 2), dtype=np.float32)
    outputs = rng.standard_normal((num_steps, *x.shape), dtype=np.float32)
    noises = rng.standard_normal((num_steps, *x.shape), dtype=np.float32)
    wanted_timesteps, wanted = peer_steps(
        peer_scheduler(**config), num_steps, eta, outputs, noises, x
    )
    timesteps, ours = our_steps(
        DDIMScheduler.from_config(config), num_steps, eta, outputs, noises, x
    )
    np.testing.assert_array_equal(timesteps, wanted_timesteps)
    for index, (actual, expected) in enumerate(zip(ours, wanted, strict=True)):
        # Near pure noise x_0 is a quotient of a small number, and may be large.
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(
            actual, expected, rtol=0, atol=tolerance * scale, err_msg=f"step {index}"
        )


GRID = [
    (beta, prediction, spacing, zero_snr)
    for beta, prediction, spacing, zero_snr in itertools.product(
        BETAS, PREDICTIONS, SPACINGS, (False, True)
    )
    # From no signal at all, noise alone says nothing of x_0: tested for its error below.
    if not (zero_snr and prediction == "epsilon" and spacing != "leading")
]


@pytest.mark.parametrize(("beta", "prediction", "spacing", "zero_snr"), GRID)
def test_steps_equal_diffusers(beta, prediction, spacing, zero_snr):
    for offset, to_one, clip_range, eta in (
        (0, True, None, 0.0),
        (1, False, None, 0.0),
        (1, True, 1.0, 0.7),
        # At full noise from no signal, diffusers takes the root of a zero that rounds below zero.
        (0, False, 0.6, 0.9 if zero_snr else 1.0),
    ):
        config = {
            "num_train_timesteps": NUM_TRAIN,
            "prediction_type": prediction,
            "timestep_spacing": spacing,
            "rescale_betas_zero_snr": zero_snr,
            "steps_offset": offset,
            "set_alpha_to_one": to_one,
            "clip_sample": clip_range is not None,
            **({"clip_sample_range": clip_range} if clip_range else {}),
            **BETAS[beta],
        }
        assert_same_steps(config, 7, eta)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_diffusers_for_every_number_of_steps(spacing):
    peer = peer_scheduler(timestep_spacing=spacing)
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    for num_steps in (*range(1, 120), 250, 333, 500, 777, 999, 1000):
        peer.set_timesteps(num_steps)
        np.testing.assert_array_equal(
            scheduler.plan(num_steps).timesteps,
            # Accumulated rounding gives diffusers a step too many here and there, at timestep -1.
            peer.timesteps.numpy()[:num_steps],
            err_msg=f"{num_steps} steps",
        )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alpha_bar_equals_diffusers(beta, zero_snr):
    config = {
        "num_train_timesteps": NUM_TRAIN,
        "rescale_betas_zero_snr": zero_snr,
        **BETAS[beta],
    }
    np.testing.assert_allclose(
        DDIMScheduler(**config).alpha_bar,
        peer_scheduler(**config).alphas_cumprod.numpy(),
        rtol=2e-5,
        atol=1e-7,
    )


def test_default_is_diffusers_default():
    assert_same_steps({}, 10, 0.0)


@pytest.mark.parametrize(
    "config",
    [
        # As Stable Diffusion 1.5 has it.
        {
            "_class_name": "PNDMScheduler",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "trained_betas": None,
        },
        {
            "_class_name": "EulerDiscreteScheduler",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "interpolation_type": "linear",
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction",
            "timestep_spacing": "linspace",
            "use_karras_sigmas": False,
        },
    ],
)
def test_other_schedulers_are_read_as_diffusers_reads_them(config):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDIMScheduler.from_config(config)
    scheduler = DDIMScheduler.from_config(config)
    for name in (
        "beta_schedule",
        "clip_sample",
        "prediction_type",
        "set_alpha_to_one",
        "steps_offset",
        "timestep_spacing",
    ):
        assert getattr(scheduler, name) == peer.config[name]
    np.testing.assert_allclose(scheduler.alpha_bar, peer.alphas_cumprod.numpy(), rtol=2e-5)


def test_is_hashable():
    first, second = (DDIMScheduler.from_config({"trained_betas": [0.1] * 1000}) for _ in "ab")
    assert hash(first) == hash(second)
    assert first == second


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        ({"thresholding": True}, "thresholding=true .* must be false or null"),
        ({"use_flow_sigmas": True, "beta_start": 1e-4}, "use_flow_sigmas=true"),
        (
            {"beta_schedule": "sigmoid"},
            'beta_schedule="sigmoid" .* must be "linear" or',
        ),
        ({"prediction_type": "flow"}, 'prediction_type="flow"'),
        ({"timestep_spacing": "log"}, 'timestep_spacing="log"'),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 .* from 2 to 100000"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values"),
        ({"beta_end": 0.0}, "betas run from 0 to 0.0001"),
        ({"beta_start": 1e-9}, "betas run from 1e-09 to 0.02; each must be above 6e-8"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "has no betas"),
    ],
)
def test_refuses_what_it_cannot_follow(config, culprit):
    with pytest.raises(UserError, match=culprit):
        DDIMScheduler.from_config(config)


ILL = (None, True, 1, -1, 1.5, 10**400, "", "x" * 5000, "\ud800", [], [[]], [None], {}, {"a": []})
ILL_FLOATS = (float("nan"), float("inf"), -1e-30)
# What is well typed among them.
ALLOWED = {
    "num_train_timesteps": (),
    "beta_start": (1,),
    "beta_end": (1,),
    "beta_schedule": (),
    "trained_betas": (None,),
    "clip_sample": (None, True),
    "clip_sample_range": (None, 1, 1.5),
    "set_alpha_to_one": (None, True),
    "steps_offset": (None, 1),
    "prediction_type": (),
    "timestep_spacing": (),
    "rescale_betas_zero_snr": (None, True),
    "thresholding": (None,),
    "use_flow_sigmas": (None,),
    "_class_name": (None, ""),
}


@pytest.mark.parametrize("key", ALLOWED)
def test_every_ill_typed_value_is_one_line_that_names_it(key):
    for value in (*ILL, *ILL_FLOATS):
        # Every class has these, so that its name alone is no reason to refuse it.
        config = {"beta_start": 1e-4, "trained_betas": None, key: value}
        if repr(value) in map(repr, ALLOWED[key]):
            DDIMScheduler.from_config(config)
            continue
        with pytest.raises(UserError) as caught:
            DDIMScheduler.from_config(config)
        message = str(caught.value)
        assert key in message and len(message) < 400 and "\n" not in message, message


def test_a_range_of_nothing_is_refused():
    for number in (0, 0.0, -1):
        with pytest.raises(UserError, match=f"clip_sample_range={number} is not supported"):
            DDIMScheduler.from_config({"clip_sample_range": number})


def test_null_is_false_or_the_default():
    nulls = dict.fromkeys(("clip_sample", "set_alpha_to_one", "steps_offset", "trained_betas"))
    scheduler = DDIMScheduler.from_config(nulls)
    assert not scheduler.clip_sample and not scheduler.set_alpha_to_one
    assert scheduler.steps_offset == 0 and scheduler.trained_betas is None


@pytest.mark.parametrize(
    ("config", "num_steps", "eta", "culprit"),
    [
        ({}, 0, 0.0, "num_steps is 0"),
        ({}, 1001, 0.0, "allows 1 to 1000"),
        ({}, 10, 1.5, "eta is 1.5"),
        ({"steps_offset": 1}, 1000, 0.0, "reaches timestep 1000"),
        (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            10,
            0.0,
            "timestep 999 holds no signal",
        ),
        # So many large betas leave more than the last timestep without a signal.
        ({"beta_end": 0.9, "prediction_type": "v_prediction"}, 10, 0.0, "holds no signal"),
    ],
)
def test_refuses_plans_the_noise_schedule_does_not_have(config, num_steps, eta, culprit):
    with pytest.raises(UserError, match=culprit):
        DDIMScheduler(**config).plan(num_steps, eta)
