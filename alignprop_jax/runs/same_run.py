"""Whether a config is of the run that a workdir holds: what may change in it, and what may not."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from alignprop_jax.config import find_changes
from alignprop_jax.devices import sharding
from alignprop_jax.devices.distributed import from_main
from alignprop_jax.errors import UserError
from alignprop_jax.runs.experiment import Experiment
from alignprop_jax.prompts.reading import load_prompts
from alignprop_jax.records.workdir import Workdir

# How far a run goes, what it leaves on the way, and how the same numbers are computed.
NOT_MEASURED = (
    "train.num_steps",
    "train.microbatch_size",
    "evaluation.every",
    "remat",
    "attention",
    "mesh.fsdp",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_best",
    "logging.tensorboard",
    "logging.wandb",
    "logging.image_every",
)
# The optimizer's settings, which a run may need to have lowered. What is recorded means the same.
OPTIMIZER = (
    "train.learning_rate",
    "train.weight_decay",
    "train.beta1",
    "train.beta2",
    "train.epsilon",
    "train.max_grad_norm",
)
MAY_CHANGE = NOT_MEASURED + OPTIMIZER
"""Keys of the config that may change when a run is resumed.

With any other, the records before and after would be of two experiments, and so would the two
pictures of a comparison.
"""

# Biases, norms and the like: few bytes, and any training changes them.
_LARGEST_LEAF = 2**16

_OF_REWARDS = ("aesthetic", "clip_score", "pickscore", "hps", "count", "remove", "jpeg")

Contents = dict[str, Any]
"""Digests of what keys of the config name, by these keys; JSON."""


def contents_of_files(config: ConfigDict) -> Contents:
    """Digests of the prompts and of the reward, whose files of Python count by what they hold.

    Raises:
        UserError: the prompts cannot be read.
    """
    if isinstance(config.reward, str):
        reward = _content_of_reward(config.reward)
    else:
        reward = sorted([_content_of_reward(name), w] for name, w in dict(config.reward).items())
    return {
        "prompts": _digest(load_prompts(config.prompts)),
        "eval_prompts": _digest(load_prompts(config.eval_prompts)),
        "reward": reward,
    }


def contents_of_weights(experiment: Experiment) -> Contents:
    """Digests of the small arrays of the model and of the reward's networks.

    All processes have to call it.
    """
    trees = {"model": experiment.params, "network of the reward": experiment.reward.params}
    contents = {}
    for name, tree in trees.items():
        small = [leaf for leaf in jax.tree.leaves(tree) if leaf.size <= _LARGEST_LEAF]
        digest = hashlib.sha256()
        for leaf in sharding.gather(small):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        contents[name] = digest.hexdigest()[:16]
    return contents


def refuse_another_run(
    workdir: Workdir,
    config: ConfigDict,
    contents: Contents,
    fixed: Callable[[str], bool] = lambda key: key not in MAY_CHANGE,
) -> None:
    """Checks that a config goes on with the run that is in the workdir, if there is one.

    Another name for the same prompts or the same reward is no change. A run of an earlier release
    has no digests: there, names decide.

    Args:
        workdir: of the run.
        config: what the program was given.
        contents: what it names; what the workdir has no digest of is not compared.
        fixed: whether a key may not change.

    Raises:
        UserError: a key has another value, or names another content; in all processes.
    """
    problem = from_main(_find_problem(workdir, config, contents, fixed))
    if problem:
        raise UserError(f"the run in {workdir.path} is another one: {problem}")


def changes_of_run(workdir: Workdir, config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns both values of every key that differs from the config of the run in the workdir."""
    before = workdir.load_config()
    return {} if before is None else find_changes(before, config)


def refuse_another_model(workdir: Workdir, config: ConfigDict, experiment: Experiment) -> None:
    """Checks that what scores a run is of its model; prompts, sampler and rewards may be others.

    Raises:
        UserError: as `refuse_another_run`.
    """
    contents = {"model": contents_of_weights(experiment)["model"]}
    refuse_another_run(workdir, config, contents, lambda key: key == "model")


def has_scale_of(workdir: Workdir, config: ConfigDict, reward: str) -> bool:
    """Whether the scale of a part of the reward in the workdir is one that its run has measured.

    Not so where the settings of rewards, or the reward's file, have changed since.
    """
    changed = changes_of_run(workdir, config)
    if not workdir.has_run() or any(key.partition(".")[0] in _OF_REWARDS for key in changed):
        return False
    known = workdir.load_contents().get("reward")
    if known is None:  # In a run of an earlier release names decide.
        return True
    content = _content_of_reward(reward)
    return any(isinstance(part, list) and part[:1] == [content] for part in known)


def _find_problem(
    workdir: Workdir, config: ConfigDict, contents: Contents, fixed: Callable[[str], bool]
) -> str | None:
    if not workdir.has_run():
        return None
    known = workdir.load_contents()
    changed = {
        key: values
        for key, values in changes_of_run(workdir, config).items()
        if fixed(key) and not (key in contents and known.get(key) == contents[key])
    }
    if changed:
        said = "; ".join(
            f"config.{key} was {was!r}, is now {now!r}" for key, (was, now) in changed.items()
        )
        return f"{said}; give it another --workdir, or what it was again"
    for name, digest in contents.items():
        if known.get(name, digest) != digest:
            named = (
                f"what config.{name}={config[name]!r} names" if name in config else f"the {name}"
            )
            return (
                f"{named} has changed since it began; give it another --workdir, or the content "
                "that it had"
            )
    return None


def _content_of_reward(name: str) -> str:
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        return name
    try:
        return f"{hashlib.sha256(Path(path).read_bytes()).hexdigest()}:{function}"
    except OSError:
        return name  # It is for the reward's loader to say so.


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
