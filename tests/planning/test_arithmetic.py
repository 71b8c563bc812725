import functools

import jax
import jax.numpy as jnp
import pytest

from alignprop_jax.core.gate import gate_gradient
from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from alignprop_jax.loading.pretrained import abstract_params
from alignprop_jax.nn import attention_functions, saved_names
from alignprop_jax.planning.arithmetic import count

SMALL = UNetConfig(
    channels=(32, 64),
    layers_per_block=(1, 1),
    transformer_layers=(1, 1),
    num_heads=(2, 2),
    down_attention=(True, True),
    up_attention=(True, True),
    context_dim=16,
    norm_num_groups=8,
)


def always(place):
    return 1.0


def test_a_network_and_its_gradient_count_as_the_compiler_counts_them():
    unet = UNet(SMALL)
    params = abstract_params(unet)
    x, context = jnp.zeros((2, 16, 16, 4)), jnp.zeros((2, 5, 16))

    def loss(params, x):
        return unet.apply({"params": params}, x, jnp.int32(3), context).sum()

    for function in (loss, jax.grad(loss, argnums=(0, 1))):
        traced = jax.jit(function).trace(params, x)
        counted = traced.lower().compile().cost_analysis()["flops"]
        # The compiler counts sums and products of single numbers, too, and leaves out those of
        # padding, which are few where a picture is 16 pixels wide but not where it is 8.
        assert count(traced.jaxpr, always).flops == pytest.approx(counted, rel=0.12)


def test_loops_count_their_turns_and_gates_their_share():
    weights, x = jnp.ones((64, 64)), jnp.ones((8, 64))
    gated = gate_gradient(lambda lora, x, constants: jnp.tanh(x @ constants) * lora, "step")

    def chain(lora, x):
        def step(x, gate):
            return gated(gate, lora, x, weights), None

        return jax.lax.scan(step, x, jnp.ones(7, bool))[0].sum()

    product = 2 * 8 * 64 * 64
    jaxpr = jax.make_jaxpr(jax.grad(chain))(1.0, x)
    places = []

    def share(place):
        places.append(place)
        return 0.25

    # Forward; and where the gate is open forward again, and the gradient by x.
    assert count(jaxpr, share).flops == 7 * (1 + 0.25 * 2) * product
    assert places and all("transpose" in place for place in places)


attend_by_kernel = functools.partial(attention_functions.attend_by_kernel, vmem_bytes=64 * 2**20)


def test_kernels_are_counted_by_what_they_do_and_by_what_matrix_units_take():
    query = jax.ShapeDtypeStruct((2, 1024, 4, 40), jnp.bfloat16)

    def loss(query):
        return attend_by_kernel(query, query, query).astype(jnp.float32).sum()

    product = 2 * 2 * 4 * 1024**2
    forward = count(jax.make_jaxpr(loss)(query), always)
    assert forward.flops == 2 * product * 40
    assert forward.kernel_flops == 2 * product * 128
    assert forward.kernel_bytes == (4 * 160 * 2 + 4 * 4) * 2 * 1024
    both = count(jax.make_jaxpr(jax.grad(loss))(query), always, matrix_unit=256)
    assert both.flops == (2 + 5) * product * 40
    assert both.kernel_flops == (2 + 5) * product * 256


def test_what_nothing_depends_on_is_not_counted():
    """A block that is evaluated again has kept what attention gave."""
    query = jax.ShapeDtypeStruct((1, 1024, 1, 128), jnp.bfloat16)
    policy = jax.checkpoint_policies.save_only_these_names(saved_names.ATTENTION)
    block = jax.checkpoint(lambda x: attend_by_kernel(x, x, x), policy=policy)
    gradient = jax.grad(lambda x: block(jnp.sin(x)).astype(jnp.float32).sum())
    counted = count(jax.make_jaxpr(gradient)(query), always)
    assert counted.flops == (2 + 5) * 2 * 1024**2 * 128


def test_what_the_compiler_divides_is_divided_evenly():
    product = functools.partial(jax.make_jaxpr(jnp.matmul), jnp.ones((8, 4)), jnp.ones((4, 2)))
    assert count(product(), always, devices=4).flops == 2 * 8 * 4 * 2 / 4
