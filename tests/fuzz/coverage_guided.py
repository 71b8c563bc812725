"""Fuzzing guided by coverage, of the parsers that are written by hand.

    python -m tests.fuzz.coverage_guided NAME --seconds=60

The strategies draw from the bytes that atheris finds to lead to new code. Exits with 1 where the
oracle finds a failure.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from random import Random

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PARSERS = {
    "topology": ("alignprop_jax.planning.topology",),
    "lora_timesteps": ("alignprop_jax.lora.mixing",),
    "hub_name": ("alignprop_jax.loading.hub", "alignprop_jax.loading.pretrained"),
    "prompt_objects_and_counts": ("alignprop_jax.prompts.objects", "alignprop_jax.rewards.count"),
    "prompt_file": ("alignprop_jax.prompts.reading",),
    "method": ("alignprop_jax.trials.methods", "alignprop_jax.config"),
    "lora_file": ("alignprop_jax.lora.files", "alignprop_jax.lora.kohya"),
    "lora_adapter": ("alignprop_jax.lora.files",),
    "single_file": (
        "alignprop_jax.generators.stable_diffusion.single_file",
        "alignprop_jax.loading.ldm_names",
        "alignprop_jax.generators.stable_diffusion.shape_configs",
        "alignprop_jax.loading.open_clip_names",
    ),
    "record_lines": ("alignprop_jax.records.metrics", "alignprop_jax.records.workdir"),
}
"""Readers by name, and the modules whose branches are counted."""


class Bytes(Random):
    """Draws from bytes, and zeros behind them."""

    def __new__(cls, data: bytes) -> "Bytes":
        return super().__new__(cls)

    def __init__(self, data: bytes):
        self._data, self._next = data, 0

    def getrandbits(self, bits: int) -> int:
        size = -(-bits // 8)
        piece = self._data[self._next : self._next + size]
        self._next += size
        return int.from_bytes(piece.ljust(size, b"\0"), "little") >> (8 * size - bits)

    def random(self) -> float:
        return self.getrandbits(16) / 2**16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PARSERS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=list(PARSERS[options.name])):
        from tests.fuzz.readers import READERS

    folder = tempfile.mkdtemp()
    reader = READERS[options.name].open(Path(folder))

    def test(data: bytes) -> None:
        reader.judge(reader.draw(Bytes(data)).value)

    arguments = [f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-max_len=256"]
    # The oracle has its own bounds.
    arguments += ["-rss_limit_mb=0", "-timeout=60", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *arguments], test)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
