"""Records on disk: exact, whole, and read whatever a machine leaves of them."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignprop_jax.inputs.foreign_json import integer
from alignprop_jax.records.metrics import JsonLines, read_json, write_atomically, write_json

STEP = {"step": integer(0, 1000)}


def test_lines_come_back_and_nan_is_null(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    assert lines.read() == []
    lines.append({"step": 1, "loss": 0.1})
    lines.append({"step": 2, "loss": math.nan})
    assert lines.read() == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": None}]


def test_floats_survive_exactly(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    value = 1.0 / 3.0
    lines.append({"step": 1, "loss": value})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    lines.keep(lambda record: True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert lines.read()[0]["loss"] == value


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    lines = JsonLines(path)
    assert [record["step"] for record in lines.read()] == [1, 2, 3]
    lines.keep(lambda record: record["step"] <= 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    lines.append({"step": 3})
    assert [record["step"] for record in lines.read()] == [1, 2, 3]


def test_summary_is_valid_json(tmp_path):
    record = {"reward_after": math.inf, "steps": 3, "loras": [{"ci95": (math.nan, 1.0)}]}
    write_json(tmp_path / "summary.json", record)
    text = (tmp_path / "summary.json").read_text()
    expected = {"reward_after": None, "steps": 3, "loras": [{"ci95": [None, 1.0]}]}
    assert json.loads(text, parse_constant=pytest.fail) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    "damage",
    [
        b"\0\0\0\0\n",
        b"\x9e\xff\x00broken\n",
        b"[1]\n",
        b"{}\n",
        b'{"step": "2"}\n',
        b'{"step": NaN}\n',
        b'{"step": 2, "glossy_mean": [1]}\n',
        b'{"step": 2, "glossy_mean": {}}\n',
        b'{"step": 2, "glossy_mean": true}\n',
        b'{"step": 2, "glossy_mean": ' + b"9" * 400 + b"}\n",
        b"[" * 100_000 + b"\n",
        b'{"step": ' + b"9" * 5000 + b"}\n",
    ],
)
def test_a_damaged_line_is_left_out_and_named(tmp_path, damage, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 3}\n')
    lines = JsonLines(path, STEP)
    assert lines.read() == [{"step": 1}, {"step": 3}]
    assert f"note: {path}: line 2 cannot be read as a record" in capsys.readouterr().out
    lines.keep(lambda record: True)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_last_line_that_lacks_nothing_but_its_end_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert JsonLines(path, STEP).read() == [{"step": 1}, {"step": 2}]


@given(st.binary(max_size=200))
def test_any_bytes_are_records_or_none(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("records")
    path = folder / "metrics.jsonl"
    path.write_bytes(b'{"step": 7}\n' + content)
    lines = JsonLines(path, STEP)
    records = lines.read()
    assert records[0] == {"step": 7} or not content.startswith(b"\n")
    lines.keep(lambda record: True)
    assert lines.read() == records
    path.write_bytes(content)
    assert isinstance(read_json(path), dict | None)


def test_a_file_that_is_damaged_counts_for_nothing(tmp_path, capsys):
    path = tmp_path / "summary.json"
    assert read_json(path) is None
    assert capsys.readouterr().out == ""
    for content in (b"", b"\0\0", b"[]", b'{"step": 1', b'{"step": -1}', b"\xff"):
        path.write_bytes(content)
        assert read_json(path, STEP) is None
    assert f"note: {path} cannot be read and counts for nothing" in capsys.readouterr().out
    path.unlink()
    path.mkdir()
    assert read_json(path) is None


def test_a_record_is_on_disk_before_it_counts(tmp_path, monkeypatch):
    """What is renamed has been synced, and then the folder's names."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(_name(file)) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or replace(a, b))
    write_json(tmp_path / "summary.json", {"steps": 1})
    assert done == ["summary.json.tmp", "rename", tmp_path.name]
    done.clear()
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    lines.append({"step": 2})
    assert done == ["metrics.jsonl", tmp_path.name, "metrics.jsonl"]


def _name(file):
    return os.path.basename(os.readlink(f"/proc/self/fd/{file}"))


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_atomically(path, "before")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "after")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


WRITES = """
import sys
from alignprop_jax.records.metrics import JsonLines, write_json
lines = JsonLines(sys.argv[1] + "/metrics.jsonl")
print("ready", flush=True)
for step in range(1, 1_000_000):
    lines.append({"step": step, "text": "x" * 2000})
    write_json(__import__("etils.epath").epath.Path(sys.argv[1]) / "summary.json", {"steps": step})
    if step % 50 == 0:
        lines.keep(lambda record: record["step"] > step - 20)
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_any_moment_leaves_whole_records(tmp_path, seed):
    line = [sys.executable, "-c", WRITES, tmp_path]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        while not (tmp_path / "summary.json").exists():
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
    summary = json.loads((tmp_path / "summary.json").read_text())
    records = JsonLines(tmp_path / "metrics.jsonl", STEP | {"step": integer(0, 10**6)}).read()
    steps = [record["step"] for record in records]
    assert steps == list(range(steps[0], steps[-1] + 1))
    assert steps[-1] in (summary["steps"], summary["steps"] + 1)
