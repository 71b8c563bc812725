"""The launch scripts parse, and fail with one clear line where they cannot work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    *sorted(ROOT.glob("launch/*.sh")),
    *sorted(ROOT.glob("examples/*/*.sh")),
    ROOT / ".ci" / "run",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script):
    subprocess.run(["bash", "-n", script], check=True)


# Of the test extra it lies beside the interpreter, of the system on the path.
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_scripts_have_nothing_shellcheck_warns_of():
    checked = subprocess.run(
        [SHELLCHECK, "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout


@pytest.fixture
def checkout(tmp_path):
    """A copy of the launch scripts in a folder with a space, with a stand-in for python3.

    The stand-in writes each call, one a line, to calls.txt; `-m venv` makes .venv around itself.
    """
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "setup.py").write_text("one\n")
    fake = root / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/bash\n"
        f"cd '{root}'\n"
        'echo "$*" >>calls.txt\n'
        'case "$*" in\n'
        "    *version_info*) [[ ! -e too_old ]] ;;\n"
        '    "-m venv"*) mkdir -p .venv/bin && cp bin/python3 .venv/bin/python ;;\n'
        '    "-m pip install"*) [[ ! -e offline ]] ;;\n'
        "esac\n"
    )
    fake.chmod(0o755)
    for name in ("python3.11", "python3.12", "python3.13"):
        shutil.copy(fake, fake.parent / name)
    return root


def launch(checkout, script, *arguments):
    """Runs a launch script; returns it and the calls of python that install or run something."""
    calls = checkout / "calls.txt"
    calls.write_text("")
    result = subprocess.run(
        ["bash", checkout / "launch" / script, *arguments],
        env={"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    lines = calls.read_text().splitlines()
    return result, [line for line in lines if "pip install" in line or "alignprop" in line]


def test_local_installs_once_and_passes_arguments_on(checkout):
    run = (
        "-m alignprop_jax.train --config=configs/emoji.py:aesthetic"
        " --workdir=runs/emoji_aesthetic --config.train.seed=1"
    )
    first, calls = launch(checkout, "local.sh", "--config.train.seed=1")
    assert first.returncode == 0, first.stderr
    assert calls == ["-m pip install --quiet --disable-pip-version-check --editable .", run]

    _, calls = launch(checkout, "local.sh", "--config.train.seed=1")
    assert calls == [run]


def test_changed_setup_is_installed_again(checkout):
    launch(checkout, "local.sh")
    (checkout / "setup.py").write_text("two\n")
    _, calls = launch(checkout, "local.sh")
    assert "pip install" in calls[0]


def test_failed_installation_is_not_taken_for_done(checkout):
    (checkout / "offline").touch()
    failed, calls = launch(checkout, "local.sh")
    assert failed.returncode != 0 and "alignprop" not in calls[-1]

    (checkout / "offline").unlink()
    _, calls = launch(checkout, "local.sh")
    assert "pip install" in calls[0] and "alignprop_jax.train" in calls[1]


def test_old_python_is_one_line(checkout):
    (checkout / "too_old").touch()
    result, _ = launch(checkout, "local.sh")
    assert result.returncode == 1
    assert result.stdout == ""
    assert (
        result.stderr.startswith("error: Python 3.11 or newer") and result.stderr.count("\n") == 1
    )
