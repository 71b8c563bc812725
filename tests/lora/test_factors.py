"""The trainable tree: what it covers, how it starts, how it enters the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from alignprop_jax.loading.pretrained import abstract_params
from alignprop_jax.lora.factors import (
    count_parameters,
    init_lora,
    merge_lora,
    mix_loras,
    scale_lora,
)
from alignprop_jax.nn.convolution import convolve_upsampled
from alignprop_jax.nn.layers import Conv, Linear

SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}


@pytest.fixture(scope="module")
def sd15_params():
    return abstract_params(UNet(UNetConfig.from_dict(SD15)))


def test_stable_diffusion_15_has_the_published_number_of_trainable_parameters(sd15_params):
    lora = init_lora(jax.random.key(0), sd15_params)
    assert count_parameters(lora) == 797_184
    assert count_parameters(sd15_params) == 859_520_964


def test_every_attention_is_adapted_and_nothing_else(sd15_params):
    lora = init_lora(jax.random.key(0), sd15_params, rank=2)
    layers = {".".join(path[:-1]) for path in flatten_dict(lora)}
    # 6 transformers on the way down, one in the middle, 9 on the way up; self and cross; q k v out.
    assert len(layers) == 16 * 2 * 4
    assert all(".attn1." in name or ".attn2." in name for name in layers)
    layer = lora["mid_block"]["attentions.0"]["transformer_blocks.0"]["attn2"]["to_k"]
    assert layer["down"].shape == (768, 2) and layer["up"].shape == (2, 1280)


def test_targets_choose_the_layers(sd15_params):
    def layers(*targets):
        lora = init_lora(jax.random.key(0), sd15_params, targets=targets)
        return {".".join(path[:-1]) for path in flatten_dict(lora)}

    assert len(layers("to_q")) == 32
    assert len(layers("attn2.to_q", "attn2.to_k")) == 32
    assert len(layers("to_q", "attn2.to_q")) == 32
    assert layers("ff.net.0.proj") == {
        name.replace("attn1.to_q", "ff.net.0.proj") for name in layers("attn1.to_q")
    }


def test_targets_may_be_convolutions(sd15_params):
    lora = init_lora(jax.random.key(0), sd15_params, 2, ("proj_in", "downsamplers.0.conv"))
    factors = flatten_dict(lora)
    assert len(factors) == 2 * (16 + 3)
    down, up = (lora["down_blocks.0"]["downsamplers.0"]["conv"][name] for name in ("down", "up"))
    assert down.shape == (3, 3, 320, 2) and up.shape == (1, 1, 2, 320) and not up.any()
    assert np.std(down) == pytest.approx(0.5, rel=0.05)


def test_a_convolution_with_factors_is_one_with_the_merged_kernel():
    """At any stride, padding and upsampling, and by the gradient of `up`."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (2, 6, 6, 5))
    for settings in ({}, {"stride": 2}, {"by": convolve_upsampled}, {"padding": ((0, 1), (0, 1))}):
        layer = Conv(7, 3, **settings)
        params = layer.init(key, x)["params"]
        lora = {
            "down": jax.random.normal(key, (3, 3, 5, 2)),
            "up": jax.random.normal(key, (1, 1, 2, 7)),
        }
        merged = merge_lora({"layer": params}, {"layer": lora})["layer"]

        def ours(lora, layer=layer, params=params):
            return layer.apply({"params": params, "lora": lora}, x)

        np.testing.assert_allclose(ours(lora), layer.apply({"params": merged}, x), atol=1e-4)
        gradient = jax.grad(lambda lora, ours=ours: (ours(lora) ** 2).sum())(lora)
        assert jnp.abs(gradient["up"]).max() > 0 and jnp.abs(gradient["down"]).max() > 0


@pytest.mark.parametrize("target", ["to_w", "o_q", "norm1", ""])
def test_target_that_is_no_such_layer_is_refused_by_name(sd15_params, target):
    with pytest.raises(UserError, match=f"lora.targets has '{target}'"):
        init_lora(jax.random.key(0), sd15_params, targets=("to_q", target))


def test_rank_below_one_is_refused(sd15_params):
    with pytest.raises(UserError, match="lora.rank is 0"):
        init_lora(jax.random.key(0), sd15_params, rank=0)


def test_no_targets_are_refused(sd15_params):
    with pytest.raises(UserError, match="lora.targets is empty"):
        init_lora(jax.random.key(0), sd15_params, targets=())


def test_factors_start_as_published():
    params = {
        "a": {"kernel": jnp.zeros((400, 30), jnp.bfloat16)},
        "b": {"kernel": jnp.zeros((400, 30))},
    }
    lora = init_lora(jax.random.key(0), params, rank=8, targets=("a", "b"))
    for layer in lora.values():
        assert layer["down"].dtype == layer["up"].dtype == jnp.float32
        np.testing.assert_allclose(layer["down"].std(), 1 / 8, rtol=0.05)
        assert not layer["up"].any()
    assert not np.allclose(lora["a"]["down"], lora["b"]["down"])
    again = init_lora(jax.random.key(0), params, rank=8, targets=("b", "a"))
    jax.tree.map(np.testing.assert_array_equal, lora, again)


def test_factored_and_merged_layers_agree_with_the_definition():
    rng = np.random.default_rng(0)
    x, kernel, down, up = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((5, 6), (6, 4), (6, 3), (3, 4))
    )
    alpha, rank = 6.0, 3
    expected = x @ kernel + (alpha / rank) * (x @ down) @ up
    layer = Linear(4, use_bias=False)
    lora = {"down": jnp.asarray(down), "up": jnp.asarray(up)}

    scaled = scale_lora(lora, alpha / rank)
    factored = layer.apply({"params": {"kernel": kernel}, "lora": scaled}, x)
    np.testing.assert_allclose(factored, expected, atol=1e-5)

    params = {"layer": {"kernel": jnp.asarray(kernel)}, "other": {"bias": jnp.ones(2)}}
    merged = merge_lora(params, {"layer": lora}, alpha / rank)
    np.testing.assert_allclose(layer.apply({"params": merged["layer"]}, x), expected, atol=1e-5)
    np.testing.assert_array_equal(merged["other"]["bias"], params["other"]["bias"])
    np.testing.assert_array_equal(params["layer"]["kernel"], kernel)


def test_merging_keeps_the_dtype_of_the_weights():
    params = {"layer": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}}
    lora = {"layer": {"down": jnp.full((2, 1), 2.0), "up": jnp.full((1, 2), 3.0)}}
    kernel = merge_lora(params, lora)["layer"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel.astype(np.float32), 7.0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mixed_factors_change_the_weights_by_the_mixed_change(alpha):
    """Of two LoRAs with different ranks that share one of their three layers."""
    rng = np.random.default_rng(0)

    def factors(rank):
        return {"down": rng.standard_normal((5, rank)), "up": rng.standard_normal((rank, 7))}

    def change(lora, layer):
        return lora[layer]["down"] @ lora[layer]["up"] if layer in lora else np.zeros((5, 7))

    a, b = {"one": factors(2), "both": factors(2)}, {"both": factors(3), "other": factors(3)}
    mixed, scaled = mix_loras(alpha, a, b), mix_loras(alpha, a)
    assert mixed.keys() == a.keys() | b.keys() and scaled.keys() == a.keys()
    assert mixed["both"]["down"].shape == (5, 5) and mixed["one"]["down"].shape == (5, 2)
    for layer in mixed:
        expected = alpha * change(a, layer) + (1 - alpha) * change(b, layer)
        np.testing.assert_allclose(change(mixed, layer), expected, atol=1e-6)
        np.testing.assert_allclose(change(scaled, layer), alpha * change(a, layer), atol=1e-6)


def test_gradient_crosses_the_scale():
    """Training differentiates by the unscaled factors: d/d up = scale * down^T x^T g."""
    layer = Linear(1, use_bias=False)
    lora = {"down": jnp.array([[3.0]]), "up": jnp.array([[5.0]])}

    def f(lora):
        variables = {"params": {"kernel": jnp.zeros((1, 1))}, "lora": scale_lora(lora, 2.0)}
        return layer.apply(variables, jnp.array([[7.0]])).sum()

    gradient = jax.grad(f)(lora)
    assert gradient["up"] == 2 * 3 * 7 and gradient["down"] == 2 * 5 * 7
