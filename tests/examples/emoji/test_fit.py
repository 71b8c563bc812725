"""The training loop, against AdamW, schedule and average written out in NumPy."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from alignprop_jax.errors import UserError
from examples.emoji.fit import Recipe, fit

RECIPE = Recipe(
    num_steps=14,
    batch_size=4,
    learning_rate=0.1,
    weight_decay=0.2,
    beta2=0.9,
    warmup_steps=3,
    decay_share=0.5,
    max_grad_norm=1.0,
    average_decay=0.5,
)


def learning_rate(step, recipe=RECIPE):
    """Rises over the warm-up, stays, and falls over the last share: a line through four points."""
    fall = recipe.num_steps - int(recipe.decay_share * recipe.num_steps)
    corners = [0, recipe.warmup_steps, fall, recipe.num_steps]
    return np.interp(step, corners, recipe.learning_rate * np.array([0, 1, 1, 0]))


def make_params():
    return {"kernel": jnp.arange(6.0).reshape(2, 3) - 2, "bias": jnp.array([0.5, -1.0, 2.0])}


def linear_loss(params, batch, key):
    """The gradient is the mean of the batch, whatever the parameters; the key is not needed."""
    del key
    mean = batch.mean(0)
    loss = (params["kernel"] * mean[:2]).sum() + (params["bias"] * mean[2]).sum()
    return loss, {"bias": params["bias"].sum()}


def noisy_loss(params, batch, key):
    loss, metrics = linear_loss(params, batch, key)
    noise = jax.random.normal(key, params["kernel"].shape)
    return loss + ((params["kernel"] - noise) ** 2).sum(), metrics


def batch_fn(rng):
    # Some of the mean gradients are longer than max_grad_norm, others are not.
    return rng.normal(0, rng.uniform(0, 1.2), size=(4, 3, 3)).astype(np.float32)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    recipe = Recipe(num_steps=20, batch_size=1, learning_rate=0.02, warmup_steps=4)
    optimizer = recipe.optimizer()
    params = {"bias": jnp.ones(2)}
    state = optimizer.init(params)
    steps = []
    for _ in range(21):
        # Under a constant gradient Adam moves by the learning rate; vectors have no decay.
        updates, state = optimizer.update({"bias": jnp.array([0.3, -0.3])}, state, params)
        steps.append(-updates["bias"] * jnp.array([1, -1]))
    expected = np.repeat([learning_rate(step, recipe) for step in range(21)], 2).reshape(21, 2)
    np.testing.assert_allclose(steps, expected, rtol=1e-5, atol=1e-8)
    assert expected[4:15].tolist() == [[0.02, 0.02]] * 11
    assert float(abs(steps[20]).max()) == 0.0


def test_result_is_the_average_of_adamw_with_clipped_gradients(tmp_path):
    params = {name: np.asarray(leaf, np.float64) for name, leaf in make_params().items()}
    average = dict(params)
    first = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    second = dict(first)
    lengths = []
    for step in range(RECIPE.num_steps):
        mean = batch_fn(np.random.default_rng([5, step])).mean(0)
        grads = {"kernel": mean[:2], "bias": mean[2]}
        lengths.append(np.sqrt(sum((g**2).sum() for g in grads.values())))
        for name in params:
            gradient = grads[name] / max(1.0, lengths[-1])
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            m = first[name] / (1 - 0.9 ** (step + 1))
            v = second[name] / (1 - 0.9 ** (step + 1))
            decay = 0.2 * params[name] if name == "kernel" else 0.0
            move = m / (np.sqrt(v) + 1e-8) + decay
            params[name] = params[name] - learning_rate(step) * move
            kept = min(0.5, (step + 1) / (step + 11))
            average[name] = kept * average[name] + (1 - kept) * params[name]
    assert min(lengths) < 1 < max(lengths)

    result = fit("part", RECIPE, linear_loss, batch_fn, make_params(), tmp_path, seed=5)
    for name in params:
        np.testing.assert_allclose(result[name], average[name], rtol=1e-4, atol=1e-5)
        assert np.abs(average[name] - params[name]).max() > 0.01


def test_killed_run_goes_on_to_the_numbers_of_a_whole_one(tmp_path):
    def run(workdir, batch_fn):
        return fit(
            "part", RECIPE, noisy_loss, batch_fn, make_params(), workdir, 1, checkpoint_every=4
        )

    class Killed(Exception):
        pass

    calls = []

    def counted(rng):
        calls.append(rng)
        return batch_fn(rng)

    def killed_at_the_tenth(rng):
        if len(calls) == 10:
            # A kill cannot be told from the files before the checkpoint of step 8 is one of them.
            deadline = time.monotonic() + 60
            while not (tmp_path / "killed/part/8").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            raise Killed
        return counted(rng)

    whole = run(tmp_path / "whole", counted)
    assert len(calls) == RECIPE.num_steps
    calls.clear()
    with pytest.raises(Killed):
        run(tmp_path / "killed", killed_at_the_tenth)
    calls.clear()
    assert_trees_equal(run(tmp_path / "killed", counted), whole)
    assert len(calls) == RECIPE.num_steps - 8

    # A finished run only reads its result.
    calls.clear()
    assert_trees_equal(run(tmp_path / "killed", counted), whole)
    assert not calls


def test_seed_decides_batches_and_randomness(tmp_path):
    recipe = dataclasses.replace(RECIPE, num_steps=3, warmup_steps=1)

    def constant_batch(rng):
        return np.ones((4, 3, 3), np.float32)

    def run(name, loss_fn, batch_fn, seed):
        return fit(name, recipe, loss_fn, batch_fn, make_params(), tmp_path, seed)["kernel"]

    assert (run("a", linear_loss, batch_fn, 0) != run("b", linear_loss, batch_fn, 1)).any()
    noisy = [run(f"noisy{seed}", noisy_loss, constant_batch, seed) for seed in (0, 1)]
    assert (noisy[0] != noisy[1]).any()


def test_checkpoint_of_other_parameters_is_refused(tmp_path):
    recipe = dataclasses.replace(RECIPE, num_steps=1)
    fit("part", recipe, linear_loss, batch_fn, make_params(), tmp_path, 0)
    wider = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros((3, 3))}
    with pytest.raises(UserError, match=r"has parameters 9, this run 15.*--workdir"):
        fit("part", recipe, linear_loss, batch_fn, wider, tmp_path, 0)


def test_muon_moves_kernels_as_pytorchs_muon_does():
    """Its first step; PyTorch iterates in bfloat16, which keeps three digits."""
    rng = np.random.default_rng(0)
    kernel, gradient = rng.normal(size=(2, 3, 3, 8, 6)).astype(np.float32)
    matrix = torch.nn.Parameter(torch.tensor(kernel.reshape(72, 6)))
    reference = torch.optim.Muon(
        [matrix], lr=0.1, weight_decay=0.2, ns_steps=3, adjust_lr_fn="match_rms_adamw"
    )
    matrix.grad = torch.tensor(gradient.reshape(72, 6))
    reference.step()

    recipe = dataclasses.replace(RECIPE, warmup_steps=0, max_grad_norm=1e6, muon=True)
    params = {"kernel": kernel, "bias": np.ones(6, np.float32)}
    grads = {"kernel": gradient, "bias": np.array([1, -1, 2, -2, 3, -3], np.float32)}
    optimizer = recipe.optimizer()
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    expected = matrix.detach().numpy().reshape(kernel.shape) - kernel
    np.testing.assert_allclose(updates["kernel"], expected, atol=0.02 * np.abs(expected).max())
    # Biases learn by Adam with Nesterov's momentum (Dozat, 2016) and do not decay.
    step = 0.1 * (0.9 * 0.1 / (1 - 0.9**2) + 0.1 / (1 - 0.9))
    np.testing.assert_allclose(updates["bias"], -step * np.sign(grads["bias"]), rtol=1e-5)
