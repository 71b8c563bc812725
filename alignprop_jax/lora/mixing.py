"""LoRA files as sampling uses them: one or a mix of two, at all timesteps or at some of them."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from absl import flags

from alignprop_jax.errors import UserError
from alignprop_jax.inputs.flag_types import define_number
from alignprop_jax.lora.factors import LoraTree, mix_loras
from alignprop_jax.lora.files import load_lora

BASE_MODEL = "none"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LoraMix:
    """What is added to the base model.

    Attributes:
        files: one LoRA file, or two to be mixed; "none" for the base model, as without any.
        mix: the share alpha of the first: the change of the weights is alpha A + (1 - alpha) B,
            where B is zero if there is one file (arXiv 2310.03739, "Mixing"; see `mix_loras`).
        timesteps: the highest and the lowest timestep at which the LoRA is on, both included; None
            for all.

    Raises:
        UserError: the settings do not go together.
    """

    files: tuple[str, ...] = ()
    mix: float | None = None
    timesteps: tuple[int, int] | None = None

    def __post_init__(self):
        if len(self.files) > 2:
            raise UserError(f"{len(self.files)} --lora are given; two can be mixed")
        if len(self.files) == 2 and BASE_MODEL in self.files:
            raise UserError(
                f"--lora={BASE_MODEL} cannot be mixed; --lora=FILE --mix=ALPHA alone mixes "
                "the file with the base model"
            )
        if len(self.files) == 2 and self.mix is None:
            raise UserError("two --lora are given; say how much of the first, with --mix=0.5")
        if self.mix is not None and not 0 <= self.mix <= 1:
            raise UserError(f"--mix is {self.mix:g}; it must lie between 0 and 1")
        if not self._adapted:
            for name, value in (("mix", self.mix), ("lora_timesteps", self.timesteps)):
                if value is not None:
                    raise UserError(f"--{name} needs a LoRA; give --lora=FILE too")

    @property
    def _adapted(self) -> bool:
        return self.files not in ((), (BASE_MODEL,))

    def load(self, params: Mapping[str, Any]) -> LoraTree | None:
        """Reads the files.

        Args:
            params: by its name, each part of the model that a LoRA may adapt, as for `load_lora`.

        Returns:
            By part, the factors with their scale folded in; None for the base model.

        Raises:
            UserError: as `load_lora`.
        """
        if not self._adapted:
            return None
        loras = [load_lora(file, params)[0] for file in self.files]
        return loras[0] if self.mix is None else mix_loras(self.mix, *loras)

    def __str__(self) -> str:
        if not self._adapted:
            return BASE_MODEL
        shares = [""] if self.mix is None else [f"{self.mix:g} ", f"{1 - self.mix:g} "]
        text = " + ".join(f"{share}{file}" for share, file in zip(shares, self.files, strict=False))
        if self.timesteps is not None:
            text += f" at timesteps {self.timesteps[0]} to {self.timesteps[1]}"
        return text


NO_LORA = LoraMix()


def parse_timesteps(text: str) -> tuple[int, int]:
    """Reads HIGH:LOW.

    Raises:
        UserError: it is something else, or the first is below the second.
    """
    match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text)
    if match is None or int(match[1]) < int(match[2]):
        raise UserError(
            f"--lora_timesteps is {text!r}; give HIGH:LOW with HIGH >= LOW, such as 1000:600"
        )
    return int(match[1]), int(match[2])


def define_lora_flags() -> Callable[[], LoraMix]:
    """Defines --lora, --mix and --lora_timesteps; returns what reads them once they are parsed."""
    return _define_flags(LoraMix)


def define_flags_of_loras() -> Callable[[], list[LoraMix]]:
    """The same flags, for a program that takes several LoRAs: those that no --mix mixes."""

    def make(files, mix, timesteps):
        if mix is None and len(files) > 1:
            return [LoraMix((file,), None, timesteps) for file in files]
        return [LoraMix(files, mix, timesteps)]

    return _define_flags(make)


def _define_flags(make: Callable[..., T]) -> Callable[[], T]:
    files = flags.DEFINE_multi_string(
        "lora",
        [],
        "LoRA file, of this project, diffusers, PEFT or kohya; none for the base model; two files "
        "are mixed by --mix",
    )
    mix = define_number(
        "mix", None, "share of the first LoRA; the rest is of the second or of no LoRA", 0, 1
    )
    timesteps = flags.DEFINE_string(
        "lora_timesteps", None, "HIGH:LOW, timesteps at which the LoRA is on, both ends included"
    )

    def read() -> T:
        between = None if timesteps.value is None else parse_timesteps(timesteps.value)
        return make(tuple(files.value), mix.value, between)

    return read
