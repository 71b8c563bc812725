import json
import math

from alignprop_jax.records.metrics import JsonLines, write_json


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
    write_json(tmp_path / "summary.json", {"reward_after": math.inf, "steps": 3})
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == {"reward_after": None, "steps": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
