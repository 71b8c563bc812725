"""A comparison of runs of seconds: interrupted, resumed, gathered, and its page in Chromium."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignprop_jax.compare import compare
from alignprop_jax.errors import UserError
from alignprop_jax.pages.comparison import write_page
from alignprop_jax.trials.methods import Method
from alignprop_jax.trials.runs import Budget, Run, plan_runs
from tests import nano_run
from tests.chromium import open_page

METHODS = ("ddpo", "draft_k")


@pytest.fixture(scope="module")
def config_file(nano_config):
    """Variants are rewards: the one that the nano run has, under two names."""
    text = nano_config.read_text().replace("def get_config():", "def get_config(variant):")
    text = text.replace(
        "    return config", "    config.train.learning_rate = RATES[variant]\n    return config"
    )
    file = nano_config.parent / "variants.py"
    file.write_text("RATES = {'slow': 1e-3, 'fast': 1e-2}\n" + text)
    return str(file)


def run_comparison(config_file, workdir, rewards=("fast",), seeds=2):
    return compare(workdir, config_file, rewards, METHODS, seeds, Budget(8, 2))


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    """A comparison that was killed in its second run, and its table."""
    workdir = tmp_path_factory.mktemp("comparison")
    trained, stops_at = [], 2
    train = Run.train

    def interrupted(run):
        trained.append(run.path)
        if len(trained) == stops_at:
            raise KeyboardInterrupt
        train(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_comparison(config_file, workdir)
        first = [(workdir / "comparison.json").read_text(), trained[0]]
        table = run_comparison(config_file, workdir)
    return workdir, table, trained, first


def test_an_interrupted_comparison_goes_on_where_it_was(finished):
    workdir, _, trained, (first, first_run) = finished
    assert trained.count(first_run) == 1 and len(trained) == 5
    assert json.loads(first)["rewards"]["fast"].keys() == {"ddpo"}
    results = json.loads((workdir / "comparison.json").read_text())["rewards"]["fast"]
    assert {name: result["seeds"] for name, result in results.items()} == dict.fromkeys(METHODS, 2)


def test_curves_are_those_of_the_runs(finished):
    workdir, table, _, _ = finished
    results = json.loads((workdir / "comparison.json").read_text())["rewards"]["fast"]
    for method in METHODS:
        result = results[method]
        # 8 queries are 4 updates of 2 images; evaluated at the beginning and every second one.
        assert result["queries"] == [0, 4, 8]
        assert result["seconds"][0] == 0 and result["seconds"] == sorted(result["seconds"])
        finals = []
        for seed in range(2):
            run = workdir / "runs" / "fast" / method / f"seed_{seed}"
            config = json.loads((run / "config.json").read_text())
            assert (config["algorithm"], config["train"]["seed"]) == (method, seed)
            finals.append(json.loads((run / "summary.json").read_text())["unseen_after"])
        assert result["unseen"]["reward"]["mean"][-1] == pytest.approx(sum(finals) / 2)
        assert f"| {method} |" in table
    assert results["ddpo"]["speedup"] in (1.0, None)


def test_a_comparison_of_other_settings_is_refused(finished, config_file):
    file = Path(config_file)
    before = file.read_text()
    file.write_text(before.replace("'fast': 1e-2", "'fast': 2e-2"))
    try:
        with pytest.raises(
            UserError, match="seed_0 is another one: config.train.learning_rate was"
        ):
            run_comparison(config_file, finished[0])
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    "name, kept, said",
    [
        ("eval.jsonl", 2, "eval.jsonl has no evaluation of step 4; remove"),
        ("eval.jsonl", 0, "eval.jsonl has no evaluation of step 0; remove"),
        ("metrics.jsonl", 3, "metrics.jsonl has 3 of 4 steps on record; remove"),
    ],
)
def test_a_run_with_damaged_records_is_named(finished, config_file, tmp_path, name, kept, said):
    workdir = shutil.copytree(finished[0], tmp_path / "comparison")
    file = workdir / "runs" / "fast" / "ddpo" / "seed_0" / name
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:kept]))
    with pytest.raises(UserError, match=said):
        run_comparison(config_file, workdir)


def test_a_picture_that_is_missing_is_blank(finished, config_file, tmp_path, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "comparison")
    picture = workdir / "runs" / "fast" / "ddpo" / "seed_0" / "images" / "train_after.png"
    picture.write_bytes(picture.read_bytes()[:40])
    run_comparison(config_file, workdir)
    assert f"note: {picture} cannot be read" in capsys.readouterr().out


def test_the_page_shows_what_is_chosen(browser, finished):
    with open_page(browser, finished[0] / "comparison.html") as page:
        curve = page.locator("path[data-method=draft_k]")
        axes = page.locator("section[data-reward=fast] svg").first
        row = page.locator("tr[data-method=draft_k]")
        drawn, label, numbers = (
            curve.get_attribute("d"),
            axes.get_attribute("aria-label"),
            row.inner_text(),
        )
        assert label == "reward against reward queries"
        page.get_by_label("seconds", exact=True).check()
        assert axes.get_attribute("aria-label") == "reward against seconds of training"
        assert curve.get_attribute("d") != drawn
        page.get_by_label("unseen").check()
        assert row.inner_text() != numbers
        picture, select = page.locator("figure img").first, page.locator("figure select").first
        before = picture.get_attribute("src")
        assert select.input_value() == "before"
        select.select_option("draft_k")
        assert picture.get_attribute("src") != before
        assert picture.get_attribute("alt") == "draft_k, unseen prompts"
        assert [complaint[:10] for complaint in page.complaints if "http" in complaint] == []


def test_every_judge_can_be_seen_against_the_reward(browser, finished, config_file, tmp_path):
    """Of made-up ones; a run of seconds has none."""
    workdir = finished[0]
    results = json.loads((workdir / "comparison.json").read_text())
    for method in results["rewards"]["fast"].values():
        for split in ("train", "unseen"):
            for name, values in {"diversity": [3.0, 2.0, 1.0], "sharp": [0.0, 1.0, 1.0]}.items():
                method[split][name] = dict.fromkeys(("mean", "std", "low", "high"), values)
    methods = [Method.parse(name) for name in METHODS]
    runs = plan_runs(workdir, config_file, ["fast"], methods, 2, Budget(8, 2))
    write_page(tmp_path / "page.html", results, runs)
    with open_page(browser, tmp_path / "page.html") as page:
        chart = page.locator("section[data-reward=fast] svg").nth(1)
        assert chart.get_attribute("aria-label") == "diversity against reward"
        assert chart.locator("circle").count() == len(METHODS)
        lowest = float(chart.locator("circle").first.get_attribute("cy"))
        page.get_by_label("judge against reward").select_option("sharp")
        assert chart.get_attribute("aria-label") == "sharp against reward"
        assert float(chart.locator("circle").first.get_attribute("cy")) < lowest
        page.get_by_label("unseen").check()
        assert chart.get_attribute("aria-label") == "sharp against reward"
        assert [complaint[:10] for complaint in page.complaints if "http" in complaint] == []


def test_a_run_that_fails_is_named_with_what_it_said(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="the run in .*ddpo/seed_0 stopped.*train.log"):
        run_comparison(config_file, tmp_path)


def test_mistakes_are_found_before_anything_runs(config_file, tmp_path):
    with pytest.raises(UserError, match="'dpo' is none of"):
        compare(tmp_path, config_file, ["fast"], ["ddpo", "dpo"], 1, Budget(8, 2))
    with pytest.raises(UserError, match="--queries=1 is less than one update of 'ddpo', 2"):
        compare(tmp_path, config_file, ["fast"], ["ddpo"], 1, Budget(1, 2))
    with pytest.raises(UserError, match="given twice"):
        compare(tmp_path, config_file, ["fast"], ["ddpo", "ddpo"], 1, Budget(8, 2))
    with pytest.raises(UserError, match="variant"):
        compare(tmp_path, config_file, ["medium"], ["ddpo"], 1, Budget(8, 2))
    assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--workdir=.*file/x cannot be written .Not a directory"):
        compare(tmp_path / "file/x", "configs/emoji.py", ["aesthetic"], [], 1, Budget(8, 1))


def has_not_ended(process):
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_the_run_ends_with_a_comparison_that_is_killed_or_stopped(config_file, tmp_path):
    run = tmp_path / "runs/fast/ddpo/seed_0"
    command = [sys.executable, "-m", "alignprop_jax.compare", f"--config={config_file}"]
    command += ["--rewards=fast", "--method=ddpo", "--seeds=1", "--queries=80"]
    command += ["--evaluations=1", f"--workdir={tmp_path}"]

    def start_and_send(number):
        before = len(nano_run.read_lines(run / "metrics.jsonl"))
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while len(nano_run.read_lines(run / "metrics.jsonl")) in (0, before):
            assert process.poll() is None
            time.sleep(0.005)
        child = json.loads((run / ".lock").read_text())["process"]
        process.send_signal(number)
        errors = process.communicate()[1]
        end = time.monotonic() + 5
        while has_not_ended(child):
            # After a signal that is answered, it ends first.
            assert number == signal.SIGKILL and time.monotonic() < end
            time.sleep(0.01)
        return process.returncode, errors

    assert start_and_send(signal.SIGKILL)[0] == -signal.SIGKILL
    # The lock that is left is nobody's.
    assert start_and_send(signal.SIGTERM) == (143, "interrupted by SIGTERM\n")
    stopped = len(nano_run.read_lines(run / "metrics.jsonl"))
    assert f"stopped after step {stopped};" in (run / "train.log").read_text()
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert f"resumed after step {stopped}" in (run / "train.log").read_text()
    assert [json.loads(line)["step"] for line in nano_run.read_lines(run / "metrics.jsonl")] == [
        *range(1, 41)
    ]
    assert not [*tmp_path.rglob(".lock")]
