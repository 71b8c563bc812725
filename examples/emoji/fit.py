"""The training loop of every part: AdamW, averaged weights, checkpoints, resumption."""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from absl import logging

from alignprop_jax.devices.sharding import check_batch_size, make_mesh, over_batch, replicated
from alignprop_jax.records.checkpoints import Checkpoints

LossFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
BatchFn = Callable[[np.random.Generator], Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and how fast one part trains.

    With `muon`, kernels learn by Muon (Jordan et al., 2024), its updates scaled to the size of
    AdamW's (Liu et al., arXiv 2502.16982), so that one learning rate serves both. The learning rate
    rises linearly over `warmup_steps`, stays, and falls linearly to zero over the
    last `decay_share` of the steps, so that a run can be prolonged from before the fall.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    beta2: float = 0.99
    warmup_steps: int = 100
    decay_share: float = 0.3
    max_grad_norm: float = 1.0
    average_decay: float = 0.999
    muon: bool = False

    def optimizer(self) -> optax.GradientTransformation:
        decay_steps = int(self.decay_share * self.num_steps)
        schedule = optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps),
                optax.constant_schedule(self.learning_rate),
                optax.linear_schedule(self.learning_rate, 0.0, decay_steps),
            ],
            [self.warmup_steps, self.num_steps - decay_steps],
        )
        if self.muon:
            step = optax.contrib.muon(
                schedule,
                ns_steps=3,
                weight_decay=self.weight_decay,
                adam_b2=self.beta2,
                adam_weight_decay=0.0,
                muon_weight_dimension_numbers=_kernels_as_matrices,
                consistent_rms=0.2,
            )
        else:
            step = optax.adamw(
                schedule, b2=self.beta2, weight_decay=self.weight_decay, mask=_kernels
            )
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), step)


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _kernels_as_matrices(params: Any) -> Any:
    """For Muon: every axis of a kernel but the last, its outputs, counts as input."""

    def dimension_numbers(leaf):
        inputs = tuple(range(leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, leaf.ndim - 1) if inputs else None

    return jax.tree.map(dimension_numbers, params)


def fit(
    name: str,
    recipe: Recipe,
    loss_fn: LossFn,
    batch_fn: BatchFn,
    params: Any,
    workdir: Path,
    seed: int,
    checkpoint_every: int = 250,
    log_every: int = 50,
) -> Any:
    """Trains `params` and returns the exponential moving average of them.

    Batch and randomness of a step depend on seed and step alone, so a run that was killed goes on
    from its last checkpoint in `workdir`/`name` as if it had not been.

    Args:
        recipe: `batch_size` images a step, split over all devices.
        loss_fn: (params, batch, key) -> (loss, metrics), scalars.
        batch_fn: makes a batch of numpy arrays from a generator.
    """
    mesh = make_mesh()
    check_batch_size(f"{name}.batch_size", recipe.batch_size, mesh)
    optimizer = recipe.optimizer()
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "average": jax.tree.map(jnp.copy, params),
        "opt_state": optimizer.init(params),
    }
    state = jax.device_put(state, replicated(mesh))
    key = jax.random.key(seed)

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state["params"], batch, jax.random.fold_in(key, state["step"])
        )
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        step = state["step"] + 1
        # The average forgets the start quickly: a tenth of the steps so far while that is less.
        decay = jnp.minimum(recipe.average_decay, step / (step + 10))
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state["average"], params)
        new_state = {"step": step, "params": params, "average": average, "opt_state": opt_state}
        return new_state, {"loss": loss, **metrics}

    fingerprint = {"part": name, "parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}
    checkpoints = Checkpoints(workdir / name, fingerprint, keep=2)
    if checkpoints.latest_step is not None:
        state = checkpoints.restore(state)
    start = int(state["step"])
    began = time.time()
    totals: dict[str, float] = {}
    for step, batch in _prefetch(batch_fn, seed, range(start, recipe.num_steps)):
        state, metrics = train_step(state, jax.device_put(batch, over_batch(mesh)))
        for metric, value in metrics.items():
            totals[metric] = totals.get(metric, 0.0) + float(value)
        if (step + 1) % log_every == 0:
            means = [f"{metric} {total / log_every:.4f}" for metric, total in totals.items()]
            pace = (time.time() - began) / (step + 1 - start)
            done = f"{name} {step + 1}/{recipe.num_steps}"
            logging.info("%s  %s  %.2f s/step", done, "  ".join(means), pace)
            totals = {}
        if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.num_steps:
            checkpoints.save(step + 1, state)
    checkpoints.close()
    return state["average"]


def _prefetch(batch_fn: BatchFn, seed: int, steps: range) -> Iterator[tuple[int, Any]]:
    """Makes the batches of the next steps in a thread while the current one trains."""
    ready: queue.Queue = queue.Queue(maxsize=2)

    def work():
        try:
            for step in steps:
                ready.put((step, batch_fn(np.random.default_rng([seed, step]))))
        except Exception as error:  # handed to the consumer, which would wait for ever otherwise
            ready.put(error)

    threading.Thread(target=work, daemon=True).start()
    for _ in steps:
        item = ready.get()
        if isinstance(item, Exception):
            raise item
        yield item
