"""Low-rank adaptation (Hu et al., 2021, arXiv 2106.09685): a trainable tree beside frozen weights.

The tree mirrors the modules of the adapted model and holds {"down": [in, r], "up": [r, out]} at
each adapted linear layer, which computes x W + (alpha / r) (x down) up. At a convolution of k x k
pixels, they are [k, k, in, r] and [1, 1, r, out]. Every layer has its own, under the name that
files have for it, those of `stacked_layers` too. The tree of a full fine-tuning holds
{"change": [...]} at every weight instead, of the weight's own shape.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key

from alignprop_jax.errors import UserError
from alignprop_jax.nn.stacked_layers import is_stacked, single_layers

LoraTree = Mapping[str, Any]

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


# Of a factor, which axis is as long as the rank; counted from the end, so for convolutions too.
_RANK_AXES = {"down": -1, "up": -2}
_CHANGE = "change"
_SCALED = ("up", _CHANGE)


def init_lora(
    key: Key[Array, ""],
    params: Mapping[str, Any],
    rank: int = 4,
    targets: Sequence[str] = ATTENTION_PROJECTIONS,
) -> LoraTree:
    """Fresh factors, float32: down of standard deviation 1 / rank, up = 0, so no change at first.

    Args:
        key: source of the random factors.
        params: the model's parameters, or anything of their shapes.
        rank: r, the same for every layer.
        targets: the names of the linear layers and convolutions to adapt, or the ends of their
            dotted paths; by default the projections of every attention.

    Raises:
        UserError: the rank is not positive, or there is no target, or one matches no such layer.
    """
    if rank < 1:
        raise UserError(f"lora.rank is {rank}; it must be at least 1")
    if not targets:
        raise UserError("lora.targets is empty; there would be nothing to train")
    known = layer_shapes(params)
    adapted = {}
    for target in targets:
        matches = {name for name in known if f".{name}".endswith(f".{target}")}
        if not matches:
            raise UserError(
                f"lora.targets has {target!r}, which is no linear layer or convolution of the "
                f"model; those of attention are {', '.join(ATTENTION_PROJECTIONS)}"
            )
        adapted |= {name: known[name] for name in matches}
    layers = sorted(adapted.values())
    # As many rows for all as the widest layer needs: one program, where one a width takes seconds.
    fans_in = [math.prod(shape[:-1]) for _, shape in layers]
    drawn = np.asarray(_draw_normal(key, len(layers), max(fans_in), rank))
    factors = {}
    for rows, fan_in, (path, (*inputs, fan_out)) in zip(drawn, fans_in, layers, strict=True):
        ones = (1,) * (len(inputs) - 1)
        factors[*path, "down"] = rows[:fan_in].reshape(*inputs, rank) / rank
        factors[*path, "up"] = np.zeros((*ones, rank, fan_out), np.float32)
    return unflatten_dict(factors)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw_normal(
    key: Key[Array, ""], number: int, rows: int, columns: int
) -> Float[Array, "n r c"]:
    """Standard normal matrices, each from a key of its own."""
    keys = jax.random.split(key, number)
    return jax.lax.map(lambda key: jax.random.normal(key, (rows, columns)), keys)


def init_changes(params: Mapping[str, Any]) -> LoraTree:
    """A change of every weight, float32, all 0: the tree of a full fine-tuning.

    Args:
        params: the model's parameters, or anything of their shapes.
    """
    leaves = flatten_dict(params).items()
    return unflatten_dict({(*path, _CHANGE): jnp.zeros(leaf.shape) for path, leaf in leaves})


def adapt(params: Mapping[str, Any], lora: LoraTree | None) -> dict[str, Any]:
    """The variables of a model with factors or changes, their scale folded in; None for neither.

    Factors are a collection of their own, which layers look up; changes are added up.
    Layers whose weights lie behind one another find their factors so, too, of the highest rank that
    one of them has; those of a lower rank and of no layer are filled up by zeros.
    """
    changed, factors = flatten_dict(params), {}
    for path, leaf in flatten_dict(lora or {}).items():
        if path[-1] == _CHANGE:
            weight = changed[path[:-1]]
            changed[path[:-1]] = weight + leaf.astype(weight.dtype)
        else:
            factors[path] = leaf
    variables = {"params": unflatten_dict(changed)}
    if not factors:
        return variables
    for path, leaf in changed.items():
        if path[-1] == "kernel" and is_stacked(path):
            layers = [single[:-1] for single, _ in single_layers(path, leaf.shape)]
            for name, rank_axis in _RANK_AXES.items():
                found = [factors.pop((*layer, name), None) for layer in layers]
                if any(factor is not None for factor in found):
                    factors[*path[:-1], name] = _stack(found, rank_axis)
    return variables | {"lora": unflatten_dict(factors)}


def _stack(factors: Sequence[Array | None], rank_axis: int) -> Float[Array, "n ..."]:
    """One behind the other, filled up to the same rank; zeros for None."""
    some = next(factor for factor in factors if factor is not None)
    empty = jnp.zeros_like(some)
    factors = [empty if factor is None else factor for factor in factors]
    rank = max(factor.shape[rank_axis] for factor in factors)

    def fill(factor: Array) -> Array:
        widths = [(0, 0)] * factor.ndim
        widths[rank_axis] = (0, rank - factor.shape[rank_axis])
        return jnp.pad(factor, widths)

    return jnp.stack([fill(factor) for factor in factors])


def layer_shapes(params: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """What can be adapted: of every linear layer and convolution, by its dotted name in files.

    Returns:
        The path in the tree of factors, and the shape of the kernel: [in, out], or
        [height, width, in, out].
    """
    return {
        ".".join(path[:-1]): (path[:-1], shape)
        for every, leaf in flatten_dict(params).items()
        for path, shape in single_layers(every, tuple(leaf.shape))
        if path[-1] == "kernel"
    }


def linear_shapes(params: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], int, int]]:
    """Path in the tree of factors, input and output size of every linear layer, by dotted name."""
    layers = layer_shapes(params).items()
    return {name: (path, *shape) for name, (path, shape) in layers if len(shape) == 2}


def rank_of(lora: LoraTree) -> int:
    """The rank of a tree of one rank."""
    (rank,) = {leaf.shape[-1] for path, leaf in flatten_dict(lora).items() if path[-1] == "down"}
    return rank


def scale_lora(lora: LoraTree, scale: float | Array) -> LoraTree:
    """Folds the scale alpha / rank into `up`: the form in which a model takes its factors.

    Changes of whole weights are multiplied by it.
    """
    return unflatten_dict(
        {
            path: leaf * scale if path[-1] in _SCALED else leaf
            for path, leaf in flatten_dict(lora).items()
        }
    )


def mix_loras(alpha: float | Array, a: LoraTree, b: LoraTree | None = None) -> LoraTree:
    """The LoRA whose change of the weights is alpha times that of `a`, plus 1 - alpha that of `b`.

    It is the change that is mixed, down up, and exactly: at a layer, the factors of both stand side
    by side, so that ranks add up. Ranks, scales and adapted layers may differ. Factors that were
    mixed one by one would multiply to cross terms of one LoRA's down with the other's up, which
    mean nothing: (down R, inverse(R) up) is the same LoRA for every R. PEFT, and diffusers'
    `set_adapters(["a", "b"], [alpha, 1 - alpha])`, mix the change too.

    Args:
        alpha: the share of `a`, in [0, 1]. Shapes do not depend on it.
        a: factors with their scale folded in.
        b: the same for the other LoRA; None for no change.
    """
    mixed = flatten_dict(scale_lora(a, alpha))
    for path, leaf in flatten_dict(scale_lora(b or {}, 1 - alpha)).items():
        both = path in mixed
        mixed[path] = jnp.concatenate([mixed[path], leaf], _RANK_AXES[path[-1]]) if both else leaf
    return unflatten_dict(mixed)


def merge_lora(params: Mapping[str, Any], lora: LoraTree, scale: float = 1.0) -> Mapping[str, Any]:
    """The parameters with W + scale * down up for each adapted W, for use without factors.

    The sum is made in float32 and stored as W was. In bfloat16 that rounds small updates away:
    train, and sample where it matters, with the factors apart.
    """
    variables = adapt(params, scale_lora(lora, scale))
    merged, factors = flatten_dict(variables["params"]), flatten_dict(variables.get("lora", {}))
    for path in {path[:-1] for path in factors}:
        kernel = merged[*path, "kernel"]
        update = jnp.matmul(
            factors[*path, "down"], factors[*path, "up"], preferred_element_type=jnp.float32
        )
        merged[*path, "kernel"] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
    return unflatten_dict(merged)


def count_parameters(tree: Any) -> int:
    """The number of scalars in a tree of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
