"""Chains as the tests call them: arrays and a tree of factors in, samples out."""

import jax
from flax.traverse_util import flatten_dict

from alignprop_jax.core.chain import Chain, Inputs
from alignprop_jax.lora.adapters import Changes, Factors


def bind(tree):
    """The adapter of a tree whose scale is folded in; None for none."""
    if tree is None:
        return None
    return Changes(tree) if next(iter(flatten_dict(tree)))[-1] == "change" else Factors(tree)


def make_sample(generator, num_steps, guidance_scale=1.0, eta=0.0, **settings):
    """Returns `sample(params, tree, start, prompts, negative, keys, *arguments, method="sample")`.

    One key stands for as many as there are samples.
    """
    guidance = generator.guidance(guidance_scale)
    chain = Chain(generator, num_steps, guidance, eta, **settings)

    def sample(
        params, tree, start, prompts, negative, keys, *arguments, method="sample", **options
    ):
        if keys.ndim == 0:
            keys = jax.random.split(keys, len(start))
        inputs = Inputs(start, prompts, negative, keys)
        return getattr(chain, method)(params, bind(tree), inputs, *arguments, **options)

    return sample
