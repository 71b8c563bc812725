"""Readers of what a run left behind, perhaps on a disk that was full or after a kill."""

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from alignprop_jax.config import default_config, to_json
from alignprop_jax.evaluation import standardization
from alignprop_jax.evaluation.standardization import standardize_parts
from alignprop_jax.records.checkpoints import Checkpoints, restore
from alignprop_jax.records.summary import describe_result, judgements, seconds_of_steps
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.runs.same_run import changes_of_run
from alignprop_jax.trials.results import gather, table
from tests.fuzz import strategies
from tests.fuzz.reader import Files, Reader, reader, same
from tests.fuzz.strategies import (
    Case,
    files,
    mutate_bytes,
    mutate_json,
    mutate_value,
)
from tests.fuzz.text_readers import leaves

_STEPS = (0, 2, 4)
_METRICS = [
    {"step": step, "reward_mean": 0.5, "loss": 1.0, "step_seconds": 0.25, "start_step": 1}
    for step in range(1, 5)
]
_EVALUATIONS = [
    {"step": step, "split": split, "n": 4, "reward_mean": 0.5, "glossy_mean": 0.25}
    for step in _STEPS
    for split in ("train", "unseen")
]
_SUMMARY = json.loads("""{
    "reward_before": 0.5, "reward_after": 0.75, "unseen_before": 0.5, "unseen_after": null,
    "steps": 4, "reward_queries": 8, "seconds_compile": 1.0, "seconds_per_step": 0.25,
    "seconds_total": 3.0, "peak_rss_gb": 0.5
}""")


def _lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _mutate_lines(random: Random, records: list[dict]) -> Case:
    """A record changed, or the bytes of the file."""
    if random.random() < 0.5:
        story, content = mutate_bytes(random, _lines(records))
        if random.random() < 0.1:
            return Case(f"{story}; NULs behind", content + bytes(4096))
        return Case(story, content)
    number = random.choice(range(len(records)))
    story, record = mutate_value(random, records[number])
    lines = [*records[:number], record, *records[number + 1 :]]
    text = "".join(strategies.to_json(line) + "\n" for line in lines)
    return Case(f"line {number}: {story}", text.encode("utf-8", "surrogatepass"))


def _check_lines(content: bytes, records: list[dict]) -> None:
    """Every record that is returned is a line of the file, in order; without damage, each is."""
    said = []
    lines = content.split(b"\n")
    for line in lines:
        try:
            said.append(json.dumps(json.loads(line.strip(b"\0"))))
        except (ValueError, RecursionError):
            continue
    held = [json.dumps(record) for record in records]
    remaining = iter(said)
    assert all(line in remaining for line in held), f"{held} of {said}"
    if content == _lines(_METRICS):
        same(held, said, "the list of records")


def _check_rewound(records: list[dict]) -> None:
    assert all(type(record["step"]) is int for record in records), "a step that is no number"


def _run(folder: Path) -> Files:
    """A finished run of a small workdir."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, train=np.ones((2, 4, 4, 3), np.uint8))
    contents = {
        "metrics.jsonl": _lines(_METRICS),
        "eval.jsonl": _lines(_EVALUATIONS),
        "summary.json": json.dumps(_SUMMARY).encode(),
        "config.json": to_json(default_config()).encode(),
        "reward_parts.json": b'{"a": [0.5, 1.0], "b": [2.0, 0.5]}',
        "images/before.npz": buffer.getvalue(),
    }
    return Files(folder, contents)


def _restoring(made: Files, read: Any, names: tuple[str, ...]) -> Any:
    """Reading that may repair its files, which are put back."""

    def reading(folder: Path) -> Any:
        try:
            return read(folder)
        finally:
            with made.changed({name: made.contents[name] for name in names}):
                pass

    return reading


@reader()
def record_lines(folder: Path) -> Reader:
    """metrics.jsonl as `train` reads it: the lines, their times, and a rewind on resume."""
    made = _run(folder)
    name = "metrics.jsonl"

    def read(folder: Path) -> Any:
        workdir = Workdir(folder)
        records = workdir.metrics.read()
        workdir.rewind(2)
        kept = workdir.metrics.read()
        return records, kept, seconds_of_steps(workdir)

    def check(value: Mapping[str, bytes], result: Any) -> None:
        records, kept, seconds = result
        if value.get(name):
            _check_lines(value[name], records)
        _check_rewound(kept)
        # NaN, which JSON has not, is null in what is written anew.
        records = json.loads(json.dumps(records), parse_constant=lambda _: None)
        same(kept, [record for record in records if record["step"] <= 2], "what is kept")
        assert all(np.isfinite(seconds)), str(seconds)

    draw = files(_mutate_lines, {name: _METRICS})
    return made.reader(draw, _restoring(made, read, (name, "summary.json")), check)


@reader()
def evaluations(folder: Path) -> Reader:
    """eval.jsonl and summary.json as the end of a run and a finished run's resume read them."""
    made = _run(folder)
    contents = {"eval.jsonl": _EVALUATIONS, "summary.json": _SUMMARY}

    def draw(random: Random) -> Case:
        name = random.choice(list(contents))
        mutate = _mutate_lines if name == "eval.jsonl" else mutate_json
        return files(mutate, contents, (name,))(random)

    def read(folder: Path) -> Any:
        workdir = Workdir(folder)
        summary = workdir.load_summary()
        if summary is None:
            return None, "", {}
        return summary, describe_result(workdir), judgements(workdir, 4)

    def check(value: Mapping[str, bytes], result: Any) -> None:
        summary, text, judged = result
        assert summary is None or (type(summary["steps"]) is int and text.isprintable())
        assert all(len(pair) == 2 for pair in judged.values())

    return made.reader(draw, read, check)


@reader()
def config_of_run(folder: Path) -> Reader:
    made = _run(folder)
    """config.json as a resume compares it with the config that it is given."""
    document = json.loads(to_json(default_config()))

    def read(folder: Path) -> Any:
        return changes_of_run(Workdir(folder), default_config())

    def check(value: Mapping[str, bytes], changes: dict[str, tuple[Any, Any]]) -> None:
        try:
            before = json.loads(value["config.json"] or b"")
            assert isinstance(before, dict)
        except (ValueError, AssertionError, RecursionError):
            same(changes, {}, "the changes since a file that cannot be read")
            return
        was, now = leaves(before), leaves(document)
        differing = {key: (was[key], now[key]) for key in now if was.get(key, now[key]) != now[key]}
        same(changes, differing, "what has changed")

    draw = files(mutate_json, {"config.json": document})
    return made.reader(draw, read, check)


@reader()
def reward_parts(folder: Path) -> Reader:
    made = _run(folder)

    def read(folder: Path) -> Any:
        evaluator = SimpleNamespace(
            experiment=SimpleNamespace(reward=SimpleNamespace(parts={"a": None, "b": None})),
            standardized=lambda statistics: statistics,
        )
        measured = {"a": (0.5, 1.0), "b": (2.0, 0.5)}
        with mock.patch.object(standardization, "_measure", lambda *_: measured):
            return standardize_parts(evaluator, Workdir(folder))

    def check(value: Mapping[str, bytes], statistics: Any) -> None:
        same(sorted(statistics), ["a", "b"], "the parts")
        for mean, std in statistics.values():
            assert type(mean) in (int, float) and type(std) in (int, float), "no numbers"
            assert np.isfinite(np.float32(mean)) and 0 < std < np.inf, f"{mean}, {std}"

    draw = files(mutate_json, {"reward_parts.json": {"a": [0.5, 1.0], "b": [2.0, 0.5]}})
    return made.reader(draw, _restoring(made, read, ("reward_parts.json",)), check)


@reader()
def images_before(folder: Path) -> Reader:
    made = _run(folder)
    name = "images/before.npz"
    others = {}
    for story, arrays in {
        "objects": {"train": np.array([{}])},
        "floats": {"train": np.full((2, 4, 4, 3), np.nan)},
        "one axis": {"train": np.zeros(3, np.uint8)},
        "another split": {"else": np.zeros((2, 4, 4, 3), np.uint8)},
        "nothing": {},
    }.items():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        others[story] = buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    others["no archive"] = buffer.getvalue()

    def draw(random: Random) -> Case:
        if random.random() < 0.05:
            return Case("missing", {name: None})
        if random.random() < 0.1:
            story = random.choice(list(others))
            return Case(story, {name: others[story]})
        story, content = mutate_bytes(random, made.contents[name])
        return Case(story, {name: content})

    shapes = {"train": (2, 4, 4, 3)}

    def check(value: Mapping[str, bytes], images: Any) -> None:
        assert images is not None or value[name] != made.contents[name], "whole, and not read"
        for split, array in (images or {}).items():
            same((array.shape, array.dtype), (shapes[split], np.uint8), split)

    return made.reader(draw, lambda f: Workdir(f).load_before(shapes), check)


@reader(0.5)
def comparison_records(folder: Path) -> Reader:
    """What `compare` gathers from the runs in its folder."""
    made = _run(folder)
    run = SimpleNamespace(
        reward="aesthetic",
        path=folder,
        method=SimpleNamespace(name="ddpo"),
        config=SimpleNamespace(train=SimpleNamespace(num_steps=4)),
        queries_per_step=2,
        is_finished=lambda: True,
    )
    contents = {
        "metrics.jsonl": _METRICS,
        "eval.jsonl": _EVALUATIONS,
        "summary.json": _SUMMARY,
    }

    def draw(random: Random) -> Case:
        name = random.choice(list(contents))
        mutate = mutate_json if name == "summary.json" else _mutate_lines
        return files(mutate, contents, (name,))(random)

    def read(folder: Path) -> Any:
        results = gather([run])
        return results, table(results)

    def check(value: Mapping[str, bytes], result: Any) -> None:
        json.dumps(result[0], allow_nan=False)

    return made.reader(draw, read, check)


@reader(0.02)
def checkpoint_folder(folder: Path) -> Reader:
    """The files of a checkpoint, as a resume and as other programs read them."""
    import jax.numpy as jnp

    fingerprint = {"model": "nano", "LoRA rank": [2]}
    state = {"step": jnp.int32(4), "lora": {"a": {"down": jnp.ones((3, 2))}}}
    whole = folder / "whole"
    checkpoints = Checkpoints(whole, fingerprint, keep=2)
    for step in (2, 4):
        checkpoints.save(step, state)
    checkpoints.close()
    contents = {
        str(path.relative_to(whole)): path.read_bytes()
        for path in sorted(whole.rglob("*"))
        if path.is_file()
    }

    def draw(random: Random) -> Case:
        name = random.choice([name for name in contents if name.startswith("4")])
        content = contents[name]
        try:
            document = json.loads(content)
        except ValueError:
            return files(mutate_bytes, {name: content})(random)
        mutate = random.choice((mutate_json, mutate_json, mutate_bytes))
        return files(mutate, {name: document if mutate is mutate_json else content})(random)

    used = folder / "used"

    def read(value: Mapping[str, bytes | None]) -> Any:
        # A reader may clean up; so each gets a folder of its own.
        shutil.rmtree(used, ignore_errors=True)
        shutil.copytree(whole, used)
        for name, content in value.items():
            if content is None:
                (used / name).unlink()
            else:
                (used / name).write_bytes(content)
        restored = restore(used)
        opened = Checkpoints(used, fingerprint, keep=2)
        try:
            return restored, opened.restore(state)
        finally:
            opened.close()

    def check(value: Mapping[str, bytes | None], result: Any) -> None:
        for tree in result:
            np.testing.assert_array_equal(np.asarray(tree["lora"]["a"]["down"]), np.ones((3, 2)))
            assert int(tree["step"]) == 4

    return Reader(draw, read, {}, check, lambda value: [str(used)])
