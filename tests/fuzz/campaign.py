"""Feeds many damaged inputs to every reader, each reader in a process that is watched.

    python -m tests.fuzz.campaign --inputs=100000 --seed=0

Prints a table, writes each distinct failure to --failures as a file that --reproduce=FILE runs
again, and exits with 1 where there is one. --only=NAME,NAME takes some readers. What a reader owes
stands in docs/robustness.md.
"""

import argparse
import base64
import concurrent.futures
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

# Before JAX is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.fuzz.oracle import SECONDS, Failure  # noqa: E402
from tests.fuzz.readers import READERS  # noqa: E402

# Over the oracle's own limit, which the watchdog leaves time to work.
_PATIENCE = 6 * SECONDS
_START = 300
# Files are written thousands of times: not to a disk, where there is a choice.
_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
_OUTCOMES = ("result", "error", "traceback", "hang", "memory", "line", "wrong", "death", "start")


def draw(name: str, reader: Any, seed: int, index: int) -> Any:
    """The input of a number: the same in every campaign of the seed."""
    return reader.draw(Random(f"{name} {seed} {index}"))


def work(name: str, seed: int, first: int, last: int) -> None:
    """A child: judges the inputs of some numbers, and writes a line for each to its output."""
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    logging.disable()
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        reader = READERS[name].open(Path(folder))
        if reader.judge(reader.valid) != "result":
            sys.exit(f"the valid input of {name} is refused")
        print("ready", file=output)
        for index in range(first, last):
            case = draw(name, reader, seed, index)
            try:
                outcome = {"outcome": reader.judge(case.value)}
            except Failure as failure:
                outcome = {"outcome": failure.kind, "place": failure.place}
                outcome |= {"detail": failure.detail, "story": case.story}
                outcome |= {"value": encode(case.value)}
            print(json.dumps({"index": index, **outcome}), file=output)


def encode(value: Any) -> Any:
    """An input as JSON can hold it."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value[: 2**22]).decode("ascii")}
    if isinstance(value, dict):
        return {"files": {name: encode(content) for name, content in value.items()}}
    return [encode(item) for item in value] if isinstance(value, list) else value


def decode(value: Any) -> Any:
    if isinstance(value, dict) and "base64" in value:
        return base64.b64decode(value["base64"])
    if isinstance(value, dict):
        return {name: decode(content) for name, content in value["files"].items()}
    return [decode(item) for item in value] if isinstance(value, list) else value


def watch(name: str, seed: int, number: int) -> list[dict[str, Any]]:
    """Runs a reader's children until all its inputs are judged; one that stops is replaced.

    A reader that refuses its valid input, or cannot be opened, has no more than that.
    """
    outcomes: list[dict[str, Any]] = []
    while len(outcomes) < number:
        command = [sys.executable, "-m", "tests.fuzz.campaign", f"--only={name}"]
        command += [f"--seed={seed}", f"--child={len(outcomes)}:{number}"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            kind, tail = _follow(child, outcomes, number)
        if len(outcomes) == number:
            break
        story = f"input {len(outcomes)} of seed {seed}"
        outcome = {"index": len(outcomes), "outcome": kind, "place": "", "story": story}
        outcomes.append({**outcome, "detail": tail, "value": None})
        if kind == "start":
            break
    return outcomes


def _follow(child: subprocess.Popen, outcomes: list, number: int) -> tuple[str, str]:
    """Takes in what a child says until it ends; how it ended, and its last words."""
    lines: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        errors = pool.submit(child.stderr.read)
        ready = False
        while True:
            line = pool.submit(child.stdout.readline)
            try:
                text = line.result(_PATIENCE if ready else _START)
            except TimeoutError:
                child.send_signal(signal.SIGKILL)
                line.result()
                errors.result()
                return "hang", "the watchdog ended it"
            if not text:
                child.wait()
                tail = errors.result()[-500:]
                return ("death" if ready else "start"), f"status {child.returncode}: {tail}"
            if ready:
                outcomes.append(json.loads(text))
            ready = True
            lines.append(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--failures", type=Path, default=Path("fuzz_failures"))
    parser.add_argument("--reproduce", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    if options.reproduce:
        return reproduce(json.loads(options.reproduce.read_text()))
    names = options.only.split(",") if options.only else list(READERS)
    if options.child:
        first, last = map(int, options.child.split(":"))
        work(names[0], options.seed, first, last)
        return 0
    total = sum(READERS[name].share for name in names)
    numbers = {name: -int(-options.inputs * READERS[name].share // total) for name in names}
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        futures = {
            name: pool.submit(watch, name, options.seed, number)
            for name, number in sorted(numbers.items(), key=lambda item: -item[1])
        }
        outcomes = {name: futures[name].result() for name in names}
    print(table(outcomes))
    failures = distinct(outcomes)
    for number, failure in enumerate(failures):
        options.failures.mkdir(parents=True, exist_ok=True)
        path = options.failures / f"{failure['reader']}_{number:03d}.json"
        path.write_text(json.dumps(failure, indent=1))
        print(f"{path}: {failure['times']} x {failure['outcome']} at {failure['place']}: ")
        print(f"    {failure['story'][:200]}\n    {failure['detail'][:300]}")
    inputs = sum(map(len, outcomes.values()))
    print(f"{inputs} inputs, {len(failures)} distinct failures, {time.monotonic() - began:.0f} s")
    return bool(failures)


def reproduce(failure: dict[str, Any]) -> int:
    """Judges the input of a file again."""
    with tempfile.TemporaryDirectory() as folder:
        reader = READERS[failure["reader"]].open(Path(folder))
        try:
            print(reader.judge(decode(failure["value"])))
        except Failure as error:
            print(error)
            return 1
    return 0


def table(outcomes: dict[str, list[dict[str, Any]]]) -> str:
    """A row a reader: how many inputs, and what came of them."""
    rows = [("reader", "inputs", *_OUTCOMES)]
    for name, found in outcomes.items():
        counts = Counter(outcome["outcome"] for outcome in found)
        rows.append((name, len(found), *(counts[kind] for kind in _OUTCOMES)))
    rows.append(("all", *(sum(column) for column in list(zip(*rows[1:], strict=True))[1:])))
    return "\n".join(f"{row[0]:26}" + "".join(f"{cell!s:>10}" for cell in row[1:]) for row in rows)


def distinct(outcomes: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of failures at one place of one kind, that with the shortest story."""
    found: dict[tuple, dict[str, Any]] = {}
    for name, of_reader in outcomes.items():
        for outcome in of_reader:
            if outcome["outcome"] in ("result", "error"):
                continue
            # Of a traceback the exception; other details quote the input.
            kind = outcome["detail"].partition(":")[0][:60]
            kind = kind if outcome["outcome"] == "traceback" else ""
            key = (name, outcome["outcome"], outcome["place"], kind)
            known = found.get(key)
            times = (known["times"] if known else 0) + 1
            if known is None or len(outcome["story"]) < len(known["story"]):
                known = {"reader": name, **outcome}
            found[key] = {**known, "times": times}
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main())
