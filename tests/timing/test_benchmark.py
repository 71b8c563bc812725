import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignprop_jax.benchmark import benchmark, describe, summarize
from alignprop_jax.errors import UserError
from alignprop_jax.timing.work import Work


def work(model="model", start=1):
    return Work(str(model), start, batch_size=4, num_steps=2, guidance_scale=2.0, repeats=2)


@pytest.mark.parametrize("start, name", [(1, "update, start 1 of 2"), (None, "sample, 2 steps")])
def test_the_package_is_timed_in_a_process_of_its_own(nano_config, start, name):
    (record,) = benchmark([work(nano_config.parent / "model", start)], rounds=1)
    own = record["alignprop_jax"]
    assert record["case"] == name and len(own["all"][0]) == 2
    assert own["seconds"] == pytest.approx(sum(own["all"][0]) / 2)
    assert own["images_per_second"] == pytest.approx(4 / own["seconds"])
    assert own["seconds_before"] > own["seconds"] and own["peak_rss_gb"] > 0.1


def test_the_peer_s_script_samples_with_diffusers(nano_config):
    pytest.importorskip("diffusers")
    script = Path(__file__).parents[2] / "alignprop_jax/timing/trl_peer.py"
    arguments = work(nano_config.parent / "model", None).arguments()
    process = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert len(json.loads(process.stdout.splitlines()[-1])["seconds"]) == 2


def test_ratios_are_those_of_medians_round_by_round():
    def result(*seconds):
        return {"seconds": list(seconds), "seconds_before": 9.0, "peak_rss_gb": 1.0}

    timed = {
        "alignprop_jax": [result(1, 1, 7), result(2, 2, 2), result(1, 1, 1)],
        "trl": [result(3, 3, 3), result(4, 4, 4), result(9, 2, 1)],
    }
    record = summarize(work(), timed)
    assert record["alignprop_jax"]["seconds"] == 1 and record["trl"]["seconds"] == 3
    # 3 / 1, 4 / 2 and 2 / 1.
    assert record["speedup"] == 2.0
    header, _, row = describe([record]).splitlines()
    assert header.count("|") == row.count("|") == 11
    assert row.startswith("| update, start 1 of 2, batch 4 | 1.00 | 4.00 |") and "2.00 |" in row


def test_a_process_that_fails_is_named():
    with pytest.raises(UserError, match="alignprop_jax.timing.own failed: .*model"):
        benchmark([work("absent_model")], rounds=1)


@pytest.mark.parametrize(
    "python, message",
    [
        ("/absent/python", "failed: .*cannot be run .No such file"),
        ("/bin/true", "printed no result; is it Python"),
        ("/bin/echo", "printed no result; is it Python"),
        ("/bin/false", "failed:"),
    ],
)
def test_a_peer_that_is_none(python, message, monkeypatch):
    monkeypatch.setattr("alignprop_jax.benchmark._OWN_COMMAND", ("/bin/echo", "{}"))
    monkeypatch.setattr(Work, "arguments", lambda self: [])
    with pytest.raises(UserError, match=f"^{python} .*trl_peer.py {message}"):
        benchmark([work()], 1, python)
