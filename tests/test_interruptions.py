"""A run of seconds is sent signals from its first moment to its last, and goes on each time."""

import itertools
import signal
import subprocess
import time

import pytest

from tests import nano_run

SETTINGS = ("--config.evaluation.every=3", "--config.checkpoint.every=2")
NUM_EVALUATIONS = 2 * (1 + 2 + 1)  # splits: before, after two of the steps, and at the end


@pytest.fixture(scope="module")
def uninterrupted(nano_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = nano_run.run("train", nano_config, workdir, *SETTINGS)
    assert process.returncode == 0, process.stderr
    return workdir


def lines(workdir, name):
    return len(nano_run.read_lines(workdir / name))


MOMENTS = {
    "at once": lambda workdir, seconds, printed: True,
    "as Python starts": lambda workdir, seconds, printed: seconds > 0.05,
    "in the imports": lambda workdir, seconds, printed: seconds > 0.8,
    "as it loads": lambda workdir, seconds, printed: (workdir / ".lock").exists(),
    "as it compiles": lambda workdir, seconds, printed: "compiling" in printed(),
    "in the first evaluation": lambda workdir, *_: lines(workdir, "eval.jsonl") == 1,
    "before the first step": lambda workdir, *_: lines(workdir, "eval.jsonl") == 2,
    "after a step": lambda workdir, *_: lines(workdir, "metrics.jsonl") == 1,
    "as a checkpoint is written": lambda workdir, *_: any(workdir.glob("checkpoints/*tmp*")),
    "in an evaluation": lambda workdir, *_: lines(workdir, "eval.jsonl") == 3,
    "before the last step": lambda workdir, *_: (
        lines(workdir, "metrics.jsonl") == nano_run.NUM_STEPS - 1
    ),
    "after the last step": lambda workdir, *_: (
        lines(workdir, "metrics.jsonl") == nano_run.NUM_STEPS
    ),
    "as the LoRA is written": lambda workdir, *_: (workdir / "lora").exists(),
    "in the last evaluation": lambda workdir, *_: (
        lines(workdir, "eval.jsonl") == NUM_EVALUATIONS - 1
    ),
    "after the last evaluation": lambda workdir, *_: (
        lines(workdir, "eval.jsonl") == NUM_EVALUATIONS
    ),
    "at the end": lambda workdir, *_: (workdir / "summary.json").exists(),
}


NUMBERS = (signal.SIGINT, signal.SIGTERM)


def interrupt(command, workdir, reached, number):
    """Returns status, output and errors of a program that is sent a signal when it is due."""
    output, errors = (workdir.with_name(name) for name in ("output", "errors"))
    with output.open("w") as stdout, errors.open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
        began = time.monotonic()
        while process.poll() is None:
            if reached(workdir, time.monotonic() - began, output.read_text):
                process.send_signal(number)
                break
            time.sleep(0.0005)
        status = process.wait(60)
    return status, output.read_text(), errors.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("moment, number", [*zip(MOMENTS, itertools.cycle(NUMBERS), strict=False)])
def test_a_signal_at_any_moment_ends_a_run_that_goes_on(
    moment, number, nano_config, uninterrupted, tmp_path
):
    workdir = tmp_path / "run"
    command = nano_run.command("train", nano_config, workdir, *SETTINGS)
    status, output, errors = interrupt(command, workdir, MOMENTS[moment], number)
    # Python's own start is not ours, nor is its end.
    expected = {128 + number} | ({-number} if "at once" == moment or "Python" in moment else set())
    if moment == "at the end":
        expected |= {0}
    assert status in expected, (output, errors)
    said = [line for line in errors.splitlines() if "training:" not in line and "it/s" not in line]
    if status == 128 + number and "stopped after step" not in output:
        assert said and said[-1] == f"interrupted by {number.name}"
    if status != -signal.SIGINT:
        assert "Traceback" not in errors and "ignored" not in errors
    assert not (workdir / ".lock").exists()
    if moment in ("after a step", "in an evaluation", "before the last step"):
        assert output.splitlines()[-1].startswith("stopped after step ")
    if not workdir.exists():
        return

    process = nano_run.run("train", nano_config, workdir, *SETTINGS)
    assert process.returncode == 0, process.stderr
    for name in ("metrics.jsonl", "eval.jsonl"):
        records = nano_run.read_records(workdir / name)
        assert records == nano_run.read_records(uninterrupted / name), name
    resumed, expected = (nano_run.read_tree(path) for path in (workdir, uninterrupted))
    assert {name for name in resumed if name.startswith("images")} == {
        name for name in expected if name.startswith("images")
    }
    assert not [name for name in resumed if name.endswith((".tmp", ".partial"))]
