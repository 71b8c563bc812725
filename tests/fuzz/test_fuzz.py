"""Every reader of foreign input: few inputs each here, many in the slow suite and in `campaign`."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from alignprop_jax.errors import UserError  # noqa: E402
from tests.fuzz import oracle  # noqa: E402
from tests.fuzz.campaign import decode, distinct, encode, watch  # noqa: E402
from tests.fuzz.coverage_guided import PARSERS  # noqa: E402
from tests.fuzz.oracle import Failure, judge  # noqa: E402
from tests.fuzz.readers import READERS  # noqa: E402

ROOT = Path(__file__).parents[2]
# Inputs of a reader whose share is one.
QUICK, SLOW = 40, 1000


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Readers by name, each opened once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = READERS[name].open(tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize("name", READERS)
def test_a_reader_gives_a_right_result_or_one_line(name, opened):
    reader = opened(name)

    @settings(
        max_examples=max(3, round(QUICK * READERS[name].share)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        # Stories are short as they are; to shrink an input of a slow reader takes minutes.
        phases=[Phase.generate],
    )
    @given(st.randoms(use_true_random=False))
    def run(random):
        story, value = reader.draw(random)
        try:
            reader.judge(value)
        except Failure as failure:
            raise AssertionError(f"{name}: {story}: {failure}") from failure

    run()


@pytest.mark.parametrize("name", READERS)
def test_a_valid_input_has_a_result(name, opened):
    reader = opened(name)
    assert reader.judge(reader.valid) == "result"


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_inputs_of_a_reader(name):
    """As a campaign has them: in a process that is watched."""
    outcomes = watch(name, seed=1, number=max(10, round(SLOW * READERS[name].share)))
    assert distinct({name: outcomes}) == []


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="atheris is not installed")
@pytest.mark.parametrize("name", PARSERS)
def test_inputs_that_coverage_leads_to(name, tmp_path):
    """Of the parsers that are written by hand."""
    command = [sys.executable, "-m", "tests.fuzz.coverage_guided", name, "--seconds=8"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


def _refuse(message):
    raise UserError(message)


@pytest.mark.parametrize(
    "kind, read",
    [
        ("traceback", lambda: [][0]),
        ("traceback", lambda: sys.exit(0)),
        ("memory", lambda: bytearray(3 << 30)),
        ("hang", lambda: time.sleep(5)),
        ("line", lambda: _refuse("something is wrong")),
        ("wrong", lambda: 2),
    ],
)
def test_the_oracle_tells_what_else_a_reader_does(kind, read, monkeypatch):
    monkeypatch.setattr(oracle, "SECONDS", 0.1)

    def check(result):
        assert result == 1, "not one"

    with pytest.raises(Failure) as failure:
        judge(read, check, ["a.json"])
    assert failure.value.kind == kind


def test_the_oracle_takes_a_right_result_and_a_line_that_names_the_culprit():
    assert judge(lambda: 1, lambda result: None) == "result"
    assert judge(lambda: _refuse("a.json: empty"), lambda result: None, ["a.json"]) == "error"


@pytest.mark.parametrize("name", READERS)
def test_an_input_follows_from_its_seed_and_stays_what_it_is_in_a_file(name, opened):
    reader = opened(name)
    for seed in range(5):
        value = reader.draw(Random(seed)).value
        assert repr(reader.draw(Random(seed)).value) == repr(value)
        assert repr(decode(encode(value))) == repr(value)


def test_a_campaign_replaces_a_child_that_dies(tmp_path, monkeypatch):
    """A reader that ends its process at its third input, and judges the others."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if '--child=' in ' '.join(sys.argv):\n"
        "    from tests.fuzz import oracle, reader\n"
        "    def judge(read, check, culprits=(), count=[0]):\n"
        "        count[0] += 1\n"
        "        os._exit(3) if count[0] == 4 else None\n"
        "        return 'result'\n"
        "    reader.judge = judge\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    outcomes = watch("topology", seed=0, number=4)
    assert [outcome["outcome"] for outcome in outcomes] == ["result", "result", "death", "result"]
