"""What a run can be told: every key with its default and the values that it may have."""

import ast
import difflib
import itertools
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from alignprop_jax.algorithms.losses import SHAPES
from alignprop_jax.algorithms.presets import (
    PRESETS,
    WITHOUT_REWARD_GRADIENT,
    check_algorithm,
    use_algorithm,
)
from alignprop_jax.core.gate import REMAT_POLICIES
from alignprop_jax.core.gradient_path import REWARD_AT, GradientPath
from alignprop_jax.core.truncation import STRATEGIES, make_truncation
from alignprop_jax.devices.sharding import ATTENTION
from alignprop_jax.errors import UserError
from alignprop_jax.inputs.foreign_json import (
    Field,
    Schema,
    boolean,
    either,
    integer,
    list_of,
    mapping_of,
    number,
    one_of,
    shorten,
    text,
)
from alignprop_jax.inputs.python_files import blamed_on, run_python_file

# Limits that flags of programs share. No run is near them, and what is computed stays in the range
# of float32 and int32.
MOST_SEED = 2**32 - 1  # the keys of larger ones are those of smaller ones
MOST_STEPS = 10_000  # of a sample
MOST_PIXELS = 8192  # of an edge
MOST_GUIDANCE = 1000.0
MOST_IMAGES = 65_536
MOST_TIMES = 10**9  # updates

_SMALLEST, _LARGEST = 1e-30, 1e9  # of what must be above 0
_PATH = 4096  # characters


def _name(default: str) -> Field:
    return text(default, most=_PATH, least=1)


def _text(default: str) -> Field:
    return text(default, most=_PATH)


def _positive(default: float, most: float = _LARGEST) -> Field:
    return number(_SMALLEST, most, default)


KEYS: Schema = {
    # A name for settings, which `use_algorithm` and --config.algorithm make; docs/algorithms.md.
    "algorithm": one_of(*PRESETS, default="alignprop"),
    # A diffusers folder, a single file, a hub id (docs/models.md), or emoji.
    "model": _name("emoji"),
    # To train on: a built-in list or a text file, one a line.
    "prompts": _name("animals"),
    "eval_prompts": _name("animals_unseen"),  # prompts never trained on
    "negative_prompt": _text(""),  # what guidance steers away from
    # A registered name, path/to/file.py:function, or a dict of name -> weight.
    "reward": either(
        text(most=_PATH, least=1), mapping_of(number(-_LARGEST, _LARGEST), 64), "aesthetic"
    ),
    "aesthetic.clip": _name(
        "emoji"
    ),  # folder of the CLIP whose image embedding is scored, or emoji
    "aesthetic.head": _text(""),  # file of the scoring head; empty: the CLIP's own, else LAION's
    "clip_score.clip": _name("emoji"),  # folder or hub id of a CLIP of transformers, or emoji
    "pickscore.clip": _name("yuvalkirstain/PickScore_v1"),
    "hps.checkpoint": _name("xswu/HPSv2/HPS_v2.1_compressed.pt"),  # a file, here or on the hub
    "hps.tokenizer": _name("openai/clip-vit-large-patch14"),  # CLIP's, of a folder or a hub id
    "count.detector": _name("emoji"),  # folder or hub id of an OWL-ViT or OWLv2, or emoji
    "count.threshold": number(1e-6, 0.999999, 0.2),  # score at which a box is half counted
    "count.number": integer(0, 1000, 0),  # of each object; 0: what the prompt says
    "remove.detector": _name("emoji"),
    "remove.concept": _text(""),  # what is to vanish, such as dog
    "jpeg.quality": integer(1, 100, 95),  # jpeg_compress and jpeg_incompress
    # target: |target - reward|; one_minus: 1 - reward; negative.
    "loss.shape": one_of(*SHAPES, default="target"),
    "loss.target": number(-_LARGEST, _LARGEST, 10.0),
    "loss.scale": _positive(1.0),  # multiplies the loss
    "sampler.num_steps": integer(1, MOST_STEPS, 50),  # denoising steps of a sample
    # 1 turns guidance, and its half of the cost, off.
    "sampler.guidance_scale": number(1, MOST_GUIDANCE, 5.0),
    # Of the images in pixels; 0: what the model was trained on.
    "sampler.height": integer(0, MOST_PIXELS, 0),
    "sampler.width": integer(0, MOST_PIXELS, 0),
    "sampler.eta": number(0, 1, 0.0),  # 0: deterministic DDIM, 1: as much noise as DDPM
    # Which denoising steps carry gradient. A strategy reads its own keys; see `Truncation`.
    "truncation.strategy": one_of(*STRATEGIES, default="uniform"),
    "truncation.start": integer(0, MOST_STEPS, 0),  # fixed: first step with gradient
    "truncation.mean": number(-_LARGEST, _LARGEST, 42.0),  # gaussian: of that step
    "truncation.std": number(0, _LARGEST, 5.0),
    # uniform and per_step: range of the first step with gradient, both ends included.
    "truncation.min": integer(0, MOST_STEPS, 0),
    "truncation.max": integer(0, MOST_STEPS, 49),
    "truncation.k": integer(0, MOST_STEPS, 1),  # last and spaced: number of steps with gradient
    # What the gradient crosses and comes from.
    "gradient.detach_input": boolean(False),  # it does not enter the UNet's input
    # sample, or prediction, at a random late step, the last one run.
    "gradient.reward_at": one_of(*REWARD_AT, default="sample"),
    "gradient.stop_share": number(0, 1, 0.25),  # prediction: how late, as a share of the steps
    "gradient.renoise": integer(0, 1000, 0),  # copies of each sample that take its last step again
    # ddpo and rwr: what an update makes of its samples.
    "rollouts.epochs": integer(1, MOST_STEPS, 2),  # how many times it uses each
    # Optimizer steps an epoch, each on a part of the samples.
    "rollouts.minibatches": integer(1, MOST_IMAGES, 2),
    # Rewards of a prompt that its next ones are compared with.
    "rollouts.history": integer(1, MOST_IMAGES, 16),
    "ddpo.clip_range": _positive(1e-4),  # of the importance weight, around 1
    "ddpo.max_advantage": _positive(5.0),  # in standard deviations
    "rwr.temperature": _positive(0.2),  # in standard deviations of the reward; low: only the best
    "lora.rank": integer(0, 4096, 4),  # 0: no LoRA but all weights of the UNet, a full fine-tuning
    "lora.alpha": _positive(4.0),  # the update is alpha / rank * up @ down
    "lora.init": _text(""),  # LoRA file to go on from, of the same rank; empty: a fresh one
    # Layers of every attention.
    "lora.targets": list_of(
        text(most=100, least=1), 1, 64, default=("to_q", "to_k", "to_v", "to_out.0")
    ),
    "train.num_steps": integer(1, MOST_TIMES, 100),  # updates
    "train.batch_size": integer(1, MOST_IMAGES, 8),  # images an update, over all devices
    # Images in memory at a time; 0: the whole batch.
    "train.microbatch_size": integer(0, MOST_IMAGES, 0),
    "train.learning_rate": _positive(1e-3, 1000.0),
    "train.weight_decay": number(0, 1000, 1e-4),
    "train.beta1": number(0, 0.999999, 0.9),
    "train.beta2": number(0, 0.999999, 0.999),
    "train.epsilon": _positive(1e-8),
    "train.max_grad_norm": _positive(1.0),
    "train.seed": integer(0, MOST_SEED, 0),
    "evaluation.every": integer(0, MOST_TIMES, 0),  # updates; 0: before and after only
    "evaluation.samples_per_prompt": integer(1, MOST_IMAGES, 4),
    # What the backward pass evaluates again: none; partial, all but convolutions and attention;
    # step, each denoising step; block, that and each block of the UNet and of the decoder within.
    # auto: the fastest of the last three that there is memory for.
    "remat": one_of("auto", *REMAT_POLICIES, default="auto"),
    # kernel (flash attention, on TPUs alone); tiles (of a head, for CPUs); blocks (of queries);
    # plain. auto: kernel or tiles, where they are for the device, else blocks.
    "attention": one_of("auto", *ATTENTION, default="auto"),
    # Of frozen weights and activations; LoRA is always float32.
    "dtype": one_of("float32", "bfloat16", default="float32"),
    # Devices that share one copy of the frozen weights, for models that do not fit on each; slower,
    # and of use with remat=step or block.
    "mesh.fsdp": integer(1, MOST_IMAGES, 1),
    "checkpoint.every": integer(0, MOST_TIMES, 20),  # updates; 0: at the end only
    "checkpoint.keep": integer(1, MOST_TIMES, 2),  # newest checkpoints to keep
    # And those of best reward on eval_prompts, where evaluated.
    "checkpoint.keep_best": integer(0, MOST_TIMES, 0),
    "logging.tensorboard": boolean(True),
    "logging.wandb": boolean(False),
    "logging.image_every": integer(0, MOST_TIMES, 0),  # updates between picture previews; 0: none
}


def default_config() -> ConfigDict:
    """Returns every key with its default; a config file starts here and changes what it must."""
    config = ConfigDict()
    for path, field in KEYS.items():
        *sections, key = path.split(".")
        if sections and sections[0] not in config:
            config[sections[0]] = ConfigDict()
        section = config[sections[0]] if sections else config
        section[key] = field.default
    # A name or a dict: of no type.
    config.reward = FieldReference(KEYS["reward"].default, field_type=object)
    return config


def gradient_path(config: ConfigDict) -> GradientPath:
    """Returns the way of the gradient that the config describes."""
    return GradientPath(make_truncation(**config.truncation), **config.gradient)


def load_config(spec: str) -> ConfigDict:
    """Returns `get_config(variant)` of the config file in `spec`, "file.py" or "file.py:variant".

    Raises:
      UserError: no such file, it fails, or what it returns has not the keys of a config.
    """
    path, _, variant = spec.partition(":")
    with blamed_on(f"config file {spec!r}"):
        get_config = getattr(run_python_file(path), "get_config", None)
        if not callable(get_config):
            raise UserError("it has no function get_config")
        config = get_config(variant) if variant else get_config()
        if type(config) is not ConfigDict:
            raise UserError(f"get_config must return a ConfigDict, not {type(config).__name__}")
        _check_keys(config)
    return config


def define_config_flag(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Defines --config=FILE.py[:VARIANT] and --config.KEY=VALUE; unknown keys are refused."""
    try:
        arguments = flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)
    except (flags.Error, ValueError):
        arguments = []  # a flag file that cannot be read is named where flags are parsed
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "FILE.py[:VARIANT] of the run",
        flag_values=flag_values,
        sys_argv=arguments,
    )
    flag_values["config"].parser = _ConfigParser(arguments)
    flags.mark_flag_as_required("config", flag_values)
    return holder


class _ConfigParser(flags.ArgumentParser):
    """Loads the file, and sees to the overrides before ml_collections applies them.

    Their names are checked, and an algorithm among them brings its settings.
    """

    def __init__(self, arguments: Sequence[str]):
        super().__init__()
        self._arguments = arguments  # those of files of flags, too

    def parse(self, path: str) -> ConfigDict:
        if (
            sum(re.match("--?config(=|$)", argument) is not None for argument in self._arguments)
            > 1
        ):
            raise UserError("--config is given twice")
        config = load_config(path).lock()
        algorithm = config.algorithm
        for argument, following in itertools.pairwise([*self._arguments, ""]):
            override = re.fullmatch(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL)
            if not override:
                continue
            check_key(override[1])
            value = following if override[2] is None else override[2]
            parse_literal(value)
            if override[1] == "algorithm":
                algorithm = value
        # The other overrides come after it. An algorithm that the file is of already stays as the
        # file has it.
        if algorithm != config.algorithm:
            use_algorithm(config, algorithm)
        return config


def parse_literal(value: str) -> Any:
    """What a literal of Python stands for; text that is none, for itself.

    Raises:
        UserError: the literal is nested too deeply.
    """
    try:
        return ast.literal_eval(value)
    except (SyntaxError, TypeError, ValueError):
        return value
    except (MemoryError, RecursionError) as error:
        raise UserError(f"the value {shorten(value)} is nested too deeply") from error


def check_key(key: str) -> None:
    """Raises UserError unless dotted `key` is one of a config's."""
    if key not in KEYS:
        raise UserError(f"unknown config key config.{key}{_suggestion(key, list(KEYS))}")


def validate(config: ConfigDict) -> None:
    """Checks every value a run depends on.

    Raises:
      UserError: names the key, its value and what is allowed.
    """
    for key, value in _check_keys(config).items():
        try:
            KEYS[key].parse(value)
        except (TypeError, ValueError, OverflowError):
            _check(False, key, value, KEYS[key].allowed)
    _check(
        config.checkpoint.keep_best == 0 or config.evaluation.every > 0,
        "checkpoint.keep_best",
        config.checkpoint.keep_best,
        "0 where config.evaluation.every=0: rewards are what tells which is best",
    )
    if config.lora.rank == 0:
        cause = "for a full fine-tuning, config.lora.rank=0"
        _check(config.dtype == "float32", "dtype", config.dtype, f"float32 {cause}")
        _check(not config.lora.init, "lora.init", config.lora.init, f"empty {cause}")
    check_algorithm(config)
    if config.algorithm in WITHOUT_REWARD_GRADIENT:
        minibatches = config.rollouts.minibatches
        _check(
            config.train.batch_size % minibatches == 0,
            "rollouts.minibatches",
            minibatches,
            f"a divisor of train.batch_size={config.train.batch_size}",
        )
    else:
        path, num_steps = gradient_path(config), config.sampler.num_steps
        path.check(num_steps)
        if path.never_trained(num_steps) == num_steps and not path.renoise:
            raise UserError(
                f"config.truncation trains none of the {num_steps} sampler steps; lower "
                f"config.truncation.{'start' if config.truncation.strategy == 'fixed' else 'min'}"
            )
    microbatch_size, batch_size = config.train.microbatch_size, config.train.batch_size
    _check(
        microbatch_size == 0 or batch_size % microbatch_size == 0,
        "train.microbatch_size",
        microbatch_size,
        f"a divisor of train.batch_size={batch_size}",
    )


def to_json(config: ConfigDict) -> str:
    """Returns the resolved config as indented JSON."""
    return json.dumps(_plain(config), indent=2) + "\n"


def find_changes(before: dict[str, Any], after: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns both values of every dotted key whose value differs between two configs.

    What one that JSON kept lacks has the default, as when there was no such key. A key that there
    is no longer is left out.
    """
    now = _leaves(_plain(after))
    was = _leaves(_plain(default_config())) | _leaves(before)
    return {key: (was[key], now[key]) for key in sorted(now) if was[key] != now[key]}


def _check_keys(config: ConfigDict) -> dict[str, Any]:
    """The values by dotted key, of a config with all keys and no other."""
    leaves = _leaves(config)
    for key in leaves:
        check_key(key)
    for key in KEYS:
        if key not in leaves:
            raise UserError(f"config.{key} is missing; start from default_config()")
    return leaves


def _check(holds: bool, key: str, value: Any, allowed: str) -> None:
    if not holds:
        raise UserError(f"config.{key}={shorten(value)} must be {allowed}")


def _plain(value: Any) -> Any:
    """Dicts for ConfigDicts, lists for tuples: what JSON gives back."""
    if isinstance(value, ConfigDict | dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _leaves(config: ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key. A reward's dict of weights is one value."""
    leaves = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if path == "reward":
            leaves[path] = _plain(value)
        elif isinstance(value, ConfigDict | dict):
            leaves |= _leaves(value, f"{path}.")
        else:
            leaves[path] = value
    return leaves


def _suggestion(key: str, known: list[str]) -> str:
    last = key.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(key, known, 1) or [
        name for name in known if name.rsplit(".", 1)[-1] == last
    ]
    return f"; did you mean config.{close[0]}?" if close else f"; known: {', '.join(known)}"
