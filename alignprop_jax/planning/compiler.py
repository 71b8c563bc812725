"""The TPU's compiler: whole programs, or what it says of them before it has written their code.

Nine tenths of a compilation go to the code of each operation. What the chip's memory will hold is
decided before, and XLA can be told to write it down.
"""

import concurrent.futures
import dataclasses
import os
import re
from pathlib import Path

import jax

# What the compiler says of a program that does not fit: of all, or of its temporaries alone.
_EXHAUSTED = {
    "all": re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm"),
    "temporaries": re.compile(r"HLO temporaries \(([\d.]+)([KMG])\) exceeds"),
}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
# In the chip's main memory; allocations in its other memories have a color.
_TEMPORARIES = re.compile(r"^allocation \d+: size (\d+), page \d+, preallocated-temp:$", re.M)
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a program.

    Attributes:
        memory: bytes of a chip beside what goes in: "temporaries", and "program" where its code
            was written. Of one that does not fit "temporaries", or "all", with what goes in.
        text: the program's, optimized; with the cycles of each operation where its code was
            written. None where it does not fit.
    """

    memory: dict[str, int]
    text: str | None


def compile_whole(traced: jax.stages.Traced) -> Compiled:
    """Compiles to the end."""
    return _compile(traced.lower())


def compile_layout(traced: jax.stages.Traced, dump: Path) -> Compiled:
    """Compiles until it is known what lies where in the chip's memory.

    The compiler goes on, in a thread that ends with the process alone.

    Args:
        dump: an empty folder, which `dump_to` has made XLA write to.
    """
    lowered = traced.lower()
    future = concurrent.futures.ThreadPoolExecutor(1).submit(_compile, lowered)
    while not future.done():
        layout = _read_layout(dump, f"jit_{traced.fun_name}")
        if layout is not None:
            return layout
        concurrent.futures.wait([future], _POLL_SECONDS)
    return future.result()


def dump_to(folder: Path) -> None:
    """Has XLA write to `folder` what it knows of programs; before it is first used."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_dump_to={folder} --xla_dump_hlo_as_text"


def _compile(lowered: jax.stages.Lowered) -> Compiled:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = exhausted_memory(str(error))
        if not memory:
            raise
        return Compiled(memory, None)
    analysis = compiled.memory_analysis()
    memory = {
        "temporaries": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }
    return Compiled(memory, compiled.as_text())


def exhausted_memory(message: str) -> dict[str, int]:
    """The bytes that an error of the compiler says are too many; empty for another error."""
    found = {name: pattern.search(message) for name, pattern in _EXHAUSTED.items()}
    return {name: int(float(m[1]) * _UNITS[m[2]]) for name, m in found.items() if m}


def _read_layout(folder: Path, module: str) -> Compiled | None:
    """What XLA has written of a module, None if that is not all there yet.

    The files are written one after the other, so the last tells that the others are complete.
    """
    last = list(folder.glob(f"*.{module}.*after_optimizations_after_buffer_assignment.txt"))
    if not last:
        return None
    stem = str(last[0]).removesuffix("_after_buffer_assignment.txt")
    allocations = Path(f"{stem}-buffer-assignment.txt").read_text()
    temporaries = sum(map(int, _TEMPORARIES.findall(allocations)))
    return Compiled({"temporaries": temporaries}, Path(f"{stem}.txt").read_text())
