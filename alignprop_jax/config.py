"""What a run can be told: every key with its default, and the checks on their values."""

import difflib
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path
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
from alignprop_jax.devices.sharding import ATTENTION
from alignprop_jax.diffusion.gradient_path import REWARD_AT, GradientPath
from alignprop_jax.diffusion.sampling import REMAT_POLICIES
from alignprop_jax.diffusion.truncation import STRATEGIES, Truncation
from alignprop_jax.errors import UserError

_CHOICES = {
    "algorithm": tuple(PRESETS),
    "loss.shape": SHAPES,
    "truncation.strategy": STRATEGIES,
    "gradient.reward_at": REWARD_AT,
    "remat": ("auto", *REMAT_POLICIES),
    "attention": ("auto", *ATTENTION),
    "dtype": ("float32", "bfloat16"),
}
_POSITIVE = (
    "loss.scale",
    "sampler.num_steps",
    "lora.alpha",
    "train.num_steps",
    "train.batch_size",
    "train.learning_rate",
    "train.epsilon",
    "train.max_grad_norm",
    "evaluation.samples_per_prompt",
    "checkpoint.keep",
    "mesh.fsdp",
    "rollouts.epochs",
    "rollouts.minibatches",
    "rollouts.history",
    "ddpo.clip_range",
    "ddpo.max_advantage",
    "rwr.temperature",
)
_NOT_NEGATIVE = (
    "lora.rank",
    "train.weight_decay",
    "train.seed",
    "train.microbatch_size",
    "evaluation.every",
    "checkpoint.every",
    "checkpoint.keep_best",
    "logging.image_every",
    "count.number",
    "sampler.height",
    "sampler.width",
)


def default_config() -> ConfigDict:
    """Returns every key with its default; a config file starts here and changes what it must."""
    config = ConfigDict()
    # alignprop, draft, draft_k, draft_lv, refl, drtune, ddpo or rwr: a name for settings, which
    # `use_algorithm` and --config.algorithm make; see docs/algorithms.md.
    config.algorithm = "alignprop"
    config.model = "emoji"  # a diffusers folder, a single file, a hub id (docs/models.md), or emoji
    config.prompts = "animals"  # prompts to train on: a built-in list or a text file, one a line
    config.eval_prompts = "animals_unseen"  # prompts never trained on
    config.negative_prompt = ""  # what guidance steers away from
    # A registered name, path/to/file.py:function, or a dict of name -> weight.
    config.reward = FieldReference("aesthetic", field_type=object)

    config.aesthetic = ConfigDict()
    config.aesthetic.clip = "emoji"  # folder of the CLIP whose image embedding is scored, or emoji
    config.aesthetic.head = ""  # file of the scoring head; empty: the CLIP's own, else LAION's

    config.clip_score = ConfigDict()
    config.clip_score.clip = "emoji"  # folder or hub id of a CLIP of transformers, or emoji
    config.pickscore = ConfigDict()
    config.pickscore.clip = "yuvalkirstain/PickScore_v1"
    config.hps = ConfigDict()
    config.hps.checkpoint = "xswu/HPSv2/HPS_v2.1_compressed.pt"  # a file, here or on the hub
    config.hps.tokenizer = "openai/clip-vit-large-patch14"  # CLIP's, of a folder or a hub id
    config.count = ConfigDict()
    config.count.detector = "emoji"  # folder or hub id of an OWL-ViT or OWLv2, or emoji
    config.count.threshold = 0.2  # score at which a box is half counted
    config.count.number = 0  # of each object; 0: what the prompt says
    config.remove = ConfigDict()
    config.remove.detector = "emoji"
    config.remove.concept = ""  # what is to vanish, such as dog
    config.jpeg = ConfigDict()  # jpeg_compress and jpeg_incompress
    config.jpeg.quality = 95  # 1 to 100

    config.loss = ConfigDict()
    config.loss.shape = "target"  # target: |target - reward|; one_minus: 1 - reward; negative
    config.loss.target = 10.0
    config.loss.scale = 1.0  # multiplies the loss

    config.sampler = ConfigDict()
    config.sampler.num_steps = 50  # denoising steps of a sample
    config.sampler.guidance_scale = 5.0  # 1 turns guidance, and its half of the cost, off
    config.sampler.height = 0  # of the images in pixels; 0: what the model was trained on
    config.sampler.width = 0
    config.sampler.eta = 0.0  # 0: deterministic DDIM, 1: as much noise as DDPM

    config.truncation = ConfigDict()  # which denoising steps carry gradient
    # full, fixed, uniform, gaussian, per_step, last, spaced
    config.truncation.strategy = "uniform"
    config.truncation.start = 0  # fixed: first step with gradient
    config.truncation.mean = 42.0  # gaussian: of the first step with gradient
    config.truncation.std = 5.0
    config.truncation.min = 0  # uniform and per_step: range of the first step with gradient,
    config.truncation.max = 49  # both ends included
    config.truncation.k = 1  # last and spaced: number of steps with gradient

    config.gradient = ConfigDict()  # what the gradient crosses and comes from
    config.gradient.detach_input = False  # it does not enter the UNet's input
    config.gradient.reward_at = "sample"  # or prediction, at a random late step, the last one run
    config.gradient.stop_share = 0.25  # prediction: how late, as a share of the steps
    config.gradient.renoise = 0  # copies of each sample that take its last step again

    config.rollouts = ConfigDict()  # ddpo and rwr: what an update makes of its samples
    config.rollouts.epochs = 2  # how many times it uses each
    config.rollouts.minibatches = 2  # optimizer steps an epoch, each on a part of the samples
    config.rollouts.history = 16  # rewards of a prompt that its next ones are compared with
    config.ddpo = ConfigDict()
    config.ddpo.clip_range = 1e-4  # of the importance weight, around 1
    config.ddpo.max_advantage = 5.0  # in standard deviations
    config.rwr = ConfigDict()
    config.rwr.temperature = 0.2  # in standard deviations of the reward; low: only the best count

    config.lora = ConfigDict()
    config.lora.rank = 4  # 0: no LoRA but all weights of the UNet, a full fine-tuning
    config.lora.alpha = 4.0  # the update is alpha / rank * up @ down
    config.lora.init = ""  # LoRA file to go on from, of the same rank; empty: a fresh one
    config.lora.targets = ("to_q", "to_k", "to_v", "to_out.0")  # layers of every attention

    config.train = ConfigDict()
    config.train.num_steps = 100  # updates
    config.train.batch_size = 8  # images an update, over all devices
    config.train.microbatch_size = 0  # images in memory at a time; 0: the whole batch
    config.train.learning_rate = 1e-3
    config.train.weight_decay = 1e-4
    config.train.beta1 = 0.9
    config.train.beta2 = 0.999
    config.train.epsilon = 1e-8
    config.train.max_grad_norm = 1.0
    config.train.seed = 0

    config.evaluation = ConfigDict()
    config.evaluation.every = 0  # updates between evaluations; 0: before and after only
    config.evaluation.samples_per_prompt = 4

    # What the backward pass evaluates again: none; partial, all but convolutions and attention;
    # step, each denoising step; block, that and each block of the UNet and of the decoder within.
    # auto: the fastest of the last three that there is memory for.
    config.remat = "auto"
    # kernel (flash attention, on TPUs alone); tiles (of a head, for CPUs); blocks (of queries);
    # plain. auto: kernel or tiles, where they are for the device, else blocks.
    config.attention = "auto"
    config.dtype = "float32"  # of frozen weights and activations; LoRA is always float32

    config.mesh = ConfigDict()
    # Devices that share one copy of the frozen weights, for models that do not fit on each; slower,
    # and of use with remat=step or block.
    config.mesh.fsdp = 1

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 20  # updates between checkpoints; 0: at the end only
    config.checkpoint.keep = 2  # newest checkpoints to keep
    config.checkpoint.keep_best = 0  # and those of best reward on eval_prompts, where evaluated

    config.logging = ConfigDict()
    config.logging.tensorboard = True
    config.logging.wandb = False
    config.logging.image_every = 0  # updates between picture previews; 0: none
    return config


def gradient_path(config: ConfigDict) -> GradientPath:
    """Returns the way of the gradient that the config describes."""
    return GradientPath(Truncation(**config.truncation), **config.gradient)


def lora_scale(config: ConfigDict) -> float:
    """Returns what factors are multiplied by, alpha / rank; 1 for a full fine-tuning."""
    return config.lora.alpha / config.lora.rank if config.lora.rank else 1.0


def load_config(spec: str) -> ConfigDict:
    """Returns `get_config(variant)` of the config file in `spec`, "file.py" or "file.py:variant".

    Raises:
      UserError: no such file, or it is no config file.
    """
    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(f"config file {path!r} not found; give --config=FILE.py[:VARIANT]")
    module_spec = importlib.util.spec_from_file_location("alignprop_jax_config_file", path)
    if module_spec is None:
        raise UserError(f"config file {path!r} is not a Python file; give --config=FILE.py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(variant) if variant else module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {spec!r} fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {path!r} must return a ConfigDict, not {type(config)}")
    return config


def define_config_flag() -> flags.FlagHolder:
    """Defines --config=FILE.py[:VARIANT] and --config.KEY=VALUE; unknown keys are refused."""
    holder = config_flags.DEFINE_config_file("config", None, "FILE.py[:VARIANT] of the run")
    flags.FLAGS["config"].parser = _ConfigParser()
    flags.mark_flag_as_required("config")
    return holder


class _ConfigParser(flags.ArgumentParser):
    """Loads the file, and sees to the overrides before ml_collections applies them.

    Their names are checked, and an algorithm among them brings its settings.
    """

    def parse(self, path: str) -> ConfigDict:
        config = load_config(path).lock()
        algorithm = config.algorithm
        for argument, following in itertools.pairwise([*sys.argv[1:], ""]):
            override = re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
            if override:
                check_key(config, override[1])
                if override[1] == "algorithm":
                    algorithm = following if override[2] is None else override[2]
        # The other overrides come after it. An algorithm that the file is of already stays as the
        # file has it.
        if algorithm != config.algorithm:
            use_algorithm(config, algorithm)
        return config


def check_key(config: ConfigDict, key: str) -> None:
    """Raises UserError unless dotted `key` is one of the config's."""
    known = list(_leaves(config))
    if key not in known:
        raise UserError(f"unknown config key config.{key}{_suggestion(key, known)}")


def validate(config: ConfigDict) -> None:
    """Checks every value a run depends on.

    Raises:
      UserError: names the key, its value and what is allowed.
    """
    _check_names_and_types(config)
    values = _leaves(config)
    for key, allowed in _CHOICES.items():
        _check(values[key] in allowed, key, values[key], f"one of {', '.join(allowed)}")
    for key in _POSITIVE:
        _check(values[key] > 0, key, values[key], "above 0")
    for key in _NOT_NEGATIVE:
        _check(values[key] >= 0, key, values[key], "0 or more")
    for key in ("train.beta1", "train.beta2"):
        _check(0 <= values[key] < 1, key, values[key], "in [0, 1)")
    for key in ("model", "prompts", "eval_prompts", "reward"):
        _check(bool(values[key]), key, values[key], "not empty")
    quality = config.jpeg.quality
    _check(1 <= quality <= 100, "jpeg.quality", quality, "in [1, 100]")
    _check(bool(config.lora.targets), "lora.targets", config.lora.targets, "not empty")
    threshold = config.count.threshold
    _check(0 < threshold < 1, "count.threshold", threshold, "in (0, 1)")
    sampler = config.sampler
    _check(0 <= sampler.eta <= 1, "sampler.eta", sampler.eta, "in [0, 1]")
    _check(
        sampler.guidance_scale >= 1, "sampler.guidance_scale", sampler.guidance_scale, "1 or more"
    )
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
        gradient_path(config).check(sampler.num_steps)
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


def _check_names_and_types(config: ConfigDict) -> None:
    """A config file may set anything; only what default_config() has, as it has it, is a key."""
    expected, actual = _leaves(default_config()), _leaves(config)
    for key, value in actual.items():
        if key not in expected:
            raise UserError(f"unknown config key config.{key}{_suggestion(key, list(expected))}")
        # bool is an int to Python, and an int is a fine float.
        wanted = type(expected[key])
        allowed = (str, dict) if key == "reward" else (float, int) if wanted is float else wanted
        if not isinstance(value, allowed) or (wanted is not bool and isinstance(value, bool)):
            names = "a name or a dict" if key == "reward" else f"of type {wanted.__name__}"
            raise UserError(f"config.{key}={value!r} must be {names}")
    for key in expected:
        if key not in actual:
            raise UserError(f"config.{key} is missing; start from default_config()")


def _check(holds: bool, key: str, value: Any, allowed: str) -> None:
    if not holds:
        raise UserError(f"config.{key}={value!r} must be {allowed}")


def _plain(value: Any) -> Any:
    """Dicts for ConfigDicts, lists for tuples: what JSON gives back."""
    if isinstance(value, ConfigDict | dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _leaves(config: ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key. A reward's dict of weights is one value."""
    leaves = {}
    for key, value in config.items():
        path = prefix + key
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
