"""The published algorithms, each by the settings that it is."""

from typing import Any

from ml_collections import ConfigDict

from alignprop_jax.errors import UserError

_PLAIN = {"gradient.detach_input": False, "gradient.reward_at": "sample", "gradient.renoise": 0}

PRESETS: dict[str, dict[str, Any]] = {
    # Prabhudesai et al., arXiv 2310.03739
    "alignprop": {**_PLAIN, "truncation.strategy": "uniform"},
    # Clark et al., arXiv 2309.17400
    "draft": {**_PLAIN, "truncation.strategy": "full"},
    "draft_k": {**_PLAIN, "truncation.strategy": "last", "truncation.k": 1},
    "draft_lv": {
        **_PLAIN,
        "truncation.strategy": "last",
        "truncation.k": 1,
        "gradient.renoise": 2,
    },
    # Xu et al., arXiv 2304.05977: steps 30 to 39 of 40
    "refl": {
        **_PLAIN,
        "truncation.strategy": "last",
        "truncation.k": 1,
        "gradient.reward_at": "prediction",
        "gradient.stop_share": 0.25,
    },
    # Wu et al., arXiv 2405.00760
    "drtune": {
        **_PLAIN,
        "truncation.strategy": "spaced",
        "truncation.k": 5,
        "gradient.detach_input": True,
        "gradient.reward_at": "prediction",
        "gradient.stop_share": 0.4,
    },
    # Black et al., arXiv 2305.13301
    "ddpo": {"sampler.eta": 1.0, "rollouts.epochs": 2},
    # Lee et al., arXiv 2302.12192
    "rwr": {"rollouts.epochs": 4},
}
"""Config values by dotted key, of each algorithm by its name in a config."""


WITHOUT_REWARD_GRADIENT = ("ddpo", "rwr")
"""The algorithms that score samples and never differentiate the reward."""


def use_algorithm(config: ConfigDict, name: str) -> None:
    """Makes a config one of the algorithm `name`; what is set afterwards departs from it.

    Raises:
        UserError: there is no such algorithm.
    """
    if name not in PRESETS:
        raise UserError(f"config.algorithm={name!r} must be one of {', '.join(PRESETS)}")
    config.algorithm = name
    config.update_from_flattened_dict(PRESETS[name])


def check_algorithm(config: ConfigDict) -> None:
    """Raises UserError where the name of an algorithm stands on settings that are not its own.

    Those that backpropagate are named for the steps that they train, all but AlignProp, which takes
    any. DDPO needs steps that are random.
    """
    name, strategy = config.algorithm, config.truncation.strategy
    if name == "ddpo" and config.sampler.eta == 0:
        raise UserError(
            "config.algorithm='ddpo' learns from the noise of the sampler, and "
            "config.sampler.eta=0 adds none; set config.sampler.eta to 1"
        )
    if name in WITHOUT_REWARD_GRADIENT:
        return
    own = PRESETS[name]["truncation.strategy"]
    if name != "alignprop" and strategy != own:
        raise UserError(
            f"config.algorithm={name!r} has truncation.strategy {own!r}, not {strategy!r}; in a "
            f"config file, use_algorithm(config, {name!r}) sets what belongs to it; for other "
            "steps set config.algorithm to alignprop"
        )
