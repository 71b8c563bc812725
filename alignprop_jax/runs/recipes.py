"""Settings for Stable Diffusion at full size: the paper's (arXiv 2310.03739) and its releases'."""

from collections.abc import Callable
from itertools import product

from ml_collections import ConfigDict

from alignprop_jax.config import default_config
from alignprop_jax.errors import UserError

_VIT_L_14 = "openai/clip-vit-large-patch14"
_DETECTOR = "google/owlvit-base-patch32"


def full_size_config(model: str, variant: str) -> ConfigDict:
    """The config of a variant: REWARD, or REWARD_SETTING.

    Without a setting, the report's method: the gradient enters a suffix of the denoising steps,
    whose first is drawn uniformly, once an update.

    Args:
        model: hub id or folder.
        variant: a key of `REWARDS`, alone or with a key of `SETTINGS`: "aesthetic", "hps_k1".

    Raises:
        UserError: the variant is unknown.
    """
    variants = {"_".join(filter(None, pair)): pair for pair in product(REWARDS, ("", *SETTINGS))}
    if variant not in variants:
        raise UserError(
            f"no variant {variant!r}; give one of {', '.join(REWARDS)}, alone or followed by one "
            f"of {', '.join(f'_{name}' for name in SETTINGS)}"
        )
    reward, setting = variants[variant]
    config = default_config()
    config.model = model
    config.dtype = "bfloat16"
    config.remat = "block"
    config.sampler.num_steps = 50
    config.sampler.guidance_scale = 7.5
    config.truncation.strategy = "uniform"
    config.truncation.max = 50
    config.train.batch_size = 128
    config.train.microbatch_size = 16
    config.train.num_steps = 100
    config.train.learning_rate = 1e-3
    config.train.weight_decay = 0.1
    config.train.max_grad_norm = 5.0
    config.checkpoint.every = 10
    config.logging.image_every = 10
    config.evaluation.samples_per_prompt = 1
    config.reward = reward
    for name in ("aesthetic", "clip_score"):
        config[name].clip = _VIT_L_14
    for name in ("count", "remove"):
        config[name].detector = _DETECTOR
    REWARDS[reward](config)
    if setting:
        SETTINGS[setting](config)
    return config


def _aesthetic(config: ConfigDict) -> None:
    config.loss.target = 10.0
    config.loss.scale = 0.01


def _cosine(config: ConfigDict) -> None:
    config.loss.shape = "one_minus"


def _pickscore(config: ConfigDict) -> None:
    config.loss.shape = "negative"
    config.loss.scale = 0.01  # of a score about 20


def _file_size(config: ConfigDict) -> None:
    config.loss.shape = "negative"
    config.loss.scale = 0.01  # of kB


def _count(config: ConfigDict) -> None:
    config.loss.shape = "negative"
    config.prompts = "animal_counts"
    config.eval_prompts = "animal_counts_unseen"


def _remove(config: ConfigDict) -> None:
    config.loss.shape = "negative"
    config.remove.concept = "frog"
    config.prompts = "animals_with_a_frog"
    config.eval_prompts = "animals_with_a_frog_unseen"


def _last_steps(number: int) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        config.truncation.strategy = "fixed"
        config.truncation.start = config.sampler.num_steps - number

    return change


def _all_steps(config: ConfigDict) -> None:
    config.truncation.strategy = "full"


def _paper_code(config: ConfigDict) -> None:
    config.truncation.strategy = "per_step"


def _repository(config: ConfigDict) -> None:
    config.sampler.guidance_scale = 5.0
    config.sampler.eta = 1.0
    config.truncation.strategy = "gaussian"
    config.truncation.mean = 42.0
    config.truncation.std = 5.0
    config.train.weight_decay = 1e-4
    config.train.max_grad_norm = 1.0


def _trl(config: ConfigDict) -> None:
    _repository(config)
    config.truncation.strategy = "per_step"
    if config.reward == "aesthetic":
        config.loss.shape = "negative"
        config.loss.scale = 1.0


REWARDS: dict[str, Callable[[ConfigDict], None]] = {
    "aesthetic": _aesthetic,
    "hps": _cosine,
    "clip_score": _cosine,
    "pickscore": _pickscore,
    "jpeg_compress": _file_size,
    "jpeg_incompress": _file_size,
    "count": _count,
    "remove": _remove,
}
"""What each reward asks of a config."""

SETTINGS: dict[str, Callable[[ConfigDict], None]] = {
    "k1": _last_steps(1),
    "k10": _last_steps(10),
    "full": _all_steps,
    "paper_code": _paper_code,
    "repository": _repository,
    "trl": _trl,
}
"""The paper's ablations of which steps are trained, and what differs in the released codes."""
