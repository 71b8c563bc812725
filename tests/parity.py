"""Comparison of a Flax module with its PyTorch peer: outputs, and gradients by every tensor."""

import functools

import jax
import numpy as np

from alignprop_jax.loading.pretrained import abstract_params
from alignprop_jax.loading.weights import fill_params, to_state_dict
from tests.torch_pipeline import torch

TOLERANCE = 1e-4
# The arithmetic is the same; compiling takes a third of the time.
QUICK_COMPILATION = {"xla_backend_optimization_level": 0}


def params_from_torch(peer, module):
    """The weights of a PyTorch module as the parameter tree of its Flax counterpart."""
    return fill_params(
        abstract_params(module),
        ((name, tensor.numpy()) for name, tensor in peer.state_dict().items()),
        type(peer).__name__,
    )


def to_nhwc(array):
    """NCHW to NHWC; other arrays as they are."""
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def assert_parity(module, peer, apply, peer_apply, inputs):
    """Asserts that both sides agree on outputs and on gradients, within 1e-4 in float32.

    The gradients are those of the outputs' inner product with a random cotangent, by every floating
    input and by every parameter.

    Args:
        apply: `apply(params, *inputs) -> array or tuple of arrays`, images and latents NHWC.
        peer_apply: `peer_apply(*inputs) -> tensor or tuple of tensors`, NCHW.
        inputs: arrays for the peer; images and latents NCHW.
    """
    rng = np.random.default_rng(0)
    params = params_from_torch(peer, module)

    peer.requires_grad_(True)
    tensors = [torch.from_numpy(x) for x in inputs]
    floating = [i for i, x in enumerate(inputs) if np.issubdtype(x.dtype, np.floating)]
    for i in floating:
        tensors[i].requires_grad_(True)
    expected = peer_apply(*tensors)
    expected = expected if isinstance(expected, tuple) else (expected,)
    # Of unit norm together, so that the gradients stay near one, where 1e-4 means something.
    cotangents = [rng.standard_normal(tuple(x.shape)).astype(np.float32) for x in expected]
    norm = np.sqrt(sum(np.sum(c**2) for c in cotangents))
    cotangents = [c / norm for c in cotangents]
    torch.autograd.backward(expected, [torch.from_numpy(c) for c in cotangents])

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILATION)
    def outputs_and_gradients(params, differentiated, rest):
        def f(params, differentiated):
            merged = {**rest, **differentiated}
            outputs = apply(params, *(merged[i] for i in range(len(inputs))))
            return outputs if isinstance(outputs, tuple) else (outputs,)

        outputs, vjp = jax.vjp(f, params, differentiated)
        return outputs, vjp(tuple(to_nhwc(c) for c in cotangents))

    ours = {i: to_nhwc(x) for i, x in enumerate(inputs)}
    outputs, (params_gradient, inputs_gradient) = outputs_and_gradients(
        params,
        {i: ours[i] for i in floating},
        {i: x for i, x in ours.items() if i not in floating},
    )

    for actual, wanted in zip(outputs, expected, strict=True):
        _assert_close(actual, to_nhwc(wanted.detach().numpy()), "output")
    for i in floating:
        _assert_close(inputs_gradient[i], to_nhwc(tensors[i].grad.numpy()), f"gradient, input {i}")
    peer_gradients = {
        name.removeprefix("text_model."): parameter.grad
        for name, parameter in peer.named_parameters()
    }
    for name, gradient in to_state_dict(params_gradient).items():
        wanted = peer_gradients[name.removeprefix("text_model.")]
        if wanted is None:
            assert not np.any(gradient), f"{name} has a gradient here alone"
        else:
            _assert_close(gradient, wanted.numpy(), f"gradient, {name}")


def _assert_close(actual, wanted, what):
    np.testing.assert_allclose(actual, wanted, atol=TOLERANCE, rtol=0, err_msg=what)
