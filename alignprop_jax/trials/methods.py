"""What is compared: an algorithm, and how its settings depart from those of the config."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from alignprop_jax.algorithms.presets import PRESETS, use_algorithm
from alignprop_jax.config import check_key, load_config, parse_literal, validate
from alignprop_jax.errors import UserError

DEFAULT_METHODS = (
    "alignprop",
    "draft_k",
    "draft_lv",
    "refl",
    "drtune",
    "ddpo",
    # At the learning rates of configs/emoji.py it falls apart.
    "rwr train.learning_rate=3e-4",
)
ABLATIONS = {
    # Of the paper, section 5.4: which steps the gradient enters.
    "k1": "alignprop truncation.strategy=last truncation.k=1",
    "k10": "alignprop truncation.strategy=last truncation.k=10",
    "random": "alignprop truncation.strategy=uniform",
    "full": "alignprop truncation.strategy=full",
    # All weights of the UNet in place of a LoRA.
    "all_weights": "alignprop lora.rank=0 train.learning_rate=1e-4",
}
"""Methods of the paper's ablations, by a name that stands for a whole description."""
# Of bytes: file systems allow 255.
_LONGEST_FOLDER = 200


@dataclasses.dataclass(frozen=True)
class Method:
    """An algorithm by its name in a config, and the keys that are set besides.

    Attributes:
        name: what it is called, in tables and as a folder.
    """

    name: str
    algorithm: str
    settings: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Method":
        """Reads "ALGORITHM KEY=VALUE KEY=VALUE ...", or the name of an ablation.

        Raises:
            UserError: there is no such algorithm, a setting has no value, or the text is too long.
        """
        text = text.strip()
        algorithm, *settings = ABLATIONS.get(text, text).split() or [""]
        if algorithm not in PRESETS:
            known = ", ".join((*PRESETS, *ABLATIONS))
            raise UserError(f"method {algorithm!r} is none of {known}")
        pairs = [setting.partition("=") for setting in settings]
        for key, equals, _ in pairs:
            if not equals:
                raise UserError(f"method {text!r}: give settings as KEY=VALUE, not {key!r}")
        method = cls(text, algorithm, tuple((key, value) for key, _, value in pairs))
        if len(method.folder.encode()) > _LONGEST_FOLDER:
            raise UserError(f"method {text!r}: too long for the name of its folder")
        return method

    @property
    def folder(self) -> str:
        """A name for a folder: that of the method, with what shells mind left out."""
        return "".join(c if c.isalnum() or c in "._=-" else "_" for c in self.name)

    def config(self, spec: str, settings: dict[str, Any]) -> ConfigDict:
        """The config of a run, validated.

        Args:
            spec: "file.py:variant".
            settings: further keys, under the method's own.

        Raises:
            UserError: a key is unknown, or a value is not allowed.
        """
        config = load_config(spec)
        if config.algorithm != self.algorithm:
            use_algorithm(config, self.algorithm)
        changes = settings | {key: parse_literal(value) for key, value in self.settings}
        for key in changes:
            check_key(key)
        try:
            config.update_from_flattened_dict(changes)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"method {self.name!r}: {error}") from error
        validate(config)
        return config
