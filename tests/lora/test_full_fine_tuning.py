"""Training all weights of the UNet: its gradient by PyTorch, and what such a run leaves."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from alignprop_jax.config import load_config, validate
from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.loading.weights import to_state_dict
from alignprop_jax.lora.factors import adapt, init_changes
from alignprop_jax.records.checkpoints import restore
from alignprop_jax.train import train
from tests.chains import make_sample
from tests.core.test_chain import GUIDANCE, NEGATIVE, NUM_STEPS, PROMPTS, torch_chain
from tests.torch_gradients import assert_close_gradients, cotangent, draw_inputs
from tests.torch_pipeline import build_torch_pipeline, torch


def tensors_of(changes):
    """A tree of changes by the names of the weights that they change, in torch's layout."""
    flat = flatten_dict(changes)
    return to_state_dict(unflatten_dict({path[:-1]: leaf for path, leaf in flat.items()}))


def test_the_gradient_by_all_weights_is_pytorchs(tmp_path):
    peer = build_torch_pipeline(tmp_path)
    sd, params, (tokenizer,) = load_stable_diffusion(tmp_path)
    inputs = draw_inputs(sd, params, tokenizer, PROMPTS, NEGATIVE)
    trained = (1, 0, 1, 1)
    sample = make_sample(sd, NUM_STEPS, GUIDANCE, remat="partial")

    @jax.jit
    @jax.grad
    def gradient(changes):
        gates = jnp.array(trained, bool)
        images = sample(params, changes, *inputs, jax.random.key(0), gates)
        return jnp.sum(images * cotangent(images))

    peer.unet.requires_grad_(True)
    images = torch_chain(peer, peer.unet, trained, *inputs)
    (images * torch.from_numpy(cotangent(images))).sum().backward()
    wanted = {name: weight.grad.numpy() for name, weight in peer.unet.named_parameters()}
    actual = tensors_of(gradient(init_changes(params["unet"])))
    assert actual.keys() == wanted.keys()
    assert_close_gradients(
        {(k,): v for k, v in actual.items()}, {(k,): v for k, v in wanted.items()}
    )


def test_changes_are_added_to_weights_and_factors_stay_apart():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"bias": jnp.ones(2)}}
    factors = {"a": {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 2))}}
    assert adapt(params, None) == {"params": params}
    assert adapt(params, factors) == {"params": params, "lora": factors}
    changed = adapt(params, {"b": {"bias": {"change": jnp.full(2, 0.5)}}})
    assert changed.keys() == {"params"}
    np.testing.assert_array_equal(changed["params"]["b"]["bias"], [1.5, 1.5])
    np.testing.assert_array_equal(params["b"]["bias"], [1, 1])


def test_a_run_leaves_a_unet_for_diffusers(nano_config, tmp_path):
    from diffusers import UNet2DConditionModel

    config = load_config(str(nano_config))
    changes = {"train.num_steps": 2, "train.learning_rate": 1e-4, "logging.image_every": 0}
    config.update_from_flattened_dict({"lora.rank": 0, **changes})
    train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "lora").exists()

    shutil.copytree(config.model, tmp_path / "model")
    shutil.copy(
        tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "model/unet"
    )
    state = UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet").state_dict()
    before = load_file(f"{config.model}/unet/diffusion_pytorch_model.safetensors")
    trained = tensors_of(restore(tmp_path / "run" / "checkpoints")["lora"])
    assert len(trained) == len(state) == len(before)
    for name, moved in trained.items():
        # Adam's step is the learning rate at most, whatever the gradient.
        assert 0 < np.abs(moved).max() < 3e-4, name
        np.testing.assert_allclose(state[name], before[name] + moved, atol=1e-7)


@pytest.mark.parametrize("key, value", [("dtype", "bfloat16"), ("lora.init", "lora.safetensors")])
def test_what_a_full_fine_tuning_cannot_have(nano_config, key, value):
    config = load_config(str(nano_config))
    config.update_from_flattened_dict({"lora.rank": 0, key: value})
    with pytest.raises(UserError, match=f"config.{key}=.*for a full fine-tuning"):
        validate(config)
