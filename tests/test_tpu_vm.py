"""launch/tpu_vm.sh, run whole, against a cloud and machines that are folders."""

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import fake_gcloud

ROOT = Path(__file__).parent.parent
SLICE = ("--name=tune", "--zone=us-west4-a", "--type=v5litepod-16", "--poll_seconds=0")
ARGUMENTS = [
    "--workdir=gs://bucket/run",
    '--config.reward={"aesthetic": 1.0, "jpeg_compress": 0.5}',
    'it\'s $HOME `date` \\ "quoted"',
    "two\nlines\n",
    "",
    "semicolon;",
    "*",
    "--",
    "größer",
]
TRAIN = ["python", "-m", "alignprop_jax.train", *ARGUMENTS]
SECRETS = {"HF_TOKEN": "hf_secret'$1", "WANDB_API_KEY": "wandb secret"}

# What stands for tmux: one session, whose process leads a group of its own.
TMUX = r"""#!/bin/bash
pid=$(cat "$HOME/tmux.pid" 2>/dev/null)
case $1 in
has-session) [[ $pid ]] && kill -0 "$pid" 2>/dev/null ;;
list-panes) [[ $pid ]] && kill -0 "$pid" 2>/dev/null && echo "$pid" ;;
kill-session) kill -HUP -- "-$pid" && rm "$HOME/tmux.pid" ;;
new-session)
    printf '%s\0' "$@" >>"$HOME/tmux.bin"
    shift 4
    setsid "$@" >/dev/null 2>&1 </dev/null &
    echo $! >"$HOME/tmux.pid"
    ;;
esac
"""

# What stands for Python: sets up as told, and as the trained program leaves what it got.
PYTHON = r"""#!/bin/bash
case "$*" in
*version_info* | "-VV" | "-m pip --version") exit 0 ;;
"-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m pip install"*) echo "$*" >>"$HOME/pip.txt" ;;
"-m alignprop_jax.train"*)
    printf '%s\0' "$@" >"$HOME/arguments.bin"
    echo "$HF_TOKEN,$WANDB_API_KEY" >"$HOME/secrets_seen.txt"
    pwd >"$HOME/cwd.txt"
    echo "step 1 on $HOME"
    [[ ! -e $CLOUD/hold ]] || sleep 60
    exit "$(cat "$CLOUD/exit_code" 2>/dev/null || echo 0)"
    ;;
*) exit 1 ;;
esac
"""


class Cloud:
    """The cloud, the checkout on this machine, and what was asked of the cloud."""

    def __init__(self, path):
        self.path = path / "cloud"
        self.checkout = path / "my checkout"
        self.slice = self.path / "slice"
        for folder in ("states", "after", "fail", "worker_bin", "bin"):
            (self.path / folder).mkdir(parents=True)
        self.write(
            "bin/gcloud",
            f'#!/bin/bash\nexec "{sys.executable}" -S "{ROOT / "tests/fake_gcloud.py"}" "$@"\n',
        )
        self.write("worker_bin/tmux", TMUX)
        self.write("worker_bin/python3", PYTHON.replace("$CLOUD", str(self.path)))
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        for name in ("setup.py", ".git/HEAD", ".venv/old", "runs/log", "configs/a b.py"):
            (self.checkout / name).parent.mkdir(exist_ok=True)
            (self.checkout / name).write_text(name)

    def write(self, name, text):
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)

    def environment(self, **variables):
        path = f"{self.path / 'bin'}:/usr/bin:/bin"
        return {"PATH": path, "FAKE_CLOUD": str(self.path), **variables}

    def launch(self, *arguments, **variables):
        """Runs launch/tpu_vm.sh, from a folder that is not the checkout."""
        return subprocess.run(
            ["bash", self.checkout / "launch/tpu_vm.sh", *arguments],
            cwd=self.path,
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self):
        """The arguments of each call of gcloud, after `compute tpus`."""
        if not (self.path / "calls.bin").exists():
            return []
        calls = (self.path / "calls.bin").read_text().split("\0\0")[:-1]
        return [call.split("\0")[2:] for call in calls]

    @property
    def verbs(self):
        return [" ".join(call[:2]) for call in self.calls]

    def got(self, worker=0):
        """The arguments of the trained program on a worker."""
        text = (self.slice / str(worker) / "arguments.bin").read_text()
        return ["python", *text.split("\0")[:-1]]


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    fake_gcloud.power_off(cloud.slice)


def check(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def flags_of(call):
    return {word for word in call if word.startswith("--")}


def test_up_runs_the_same_command_on_every_worker_of_a_new_slice(cloud):
    cloud.write("workers.txt", "2")
    result = check(cloud.launch("up", *SLICE, "--", *TRAIN))
    for worker in (0, 1):
        assert cloud.got(worker) == TRAIN
        home = cloud.slice / str(worker)
        assert (home / "cwd.txt").read_text().strip() == str(home / "alignprop_jax")
        assert "--editable .[tpu]" in (home / "pip.txt").read_text()
    assert f"step 1 on {cloud.slice / '0'}" in result.stdout
    assert f"step 1 on {cloud.slice / '1'}" not in result.stdout
    create = cloud.calls[cloud.verbs.index("tpu-vm create")]
    assert create[2] == "tune"
    assert flags_of(create) == {
        "--accelerator-type=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite",
        "--zone=us-west4-a",
        "--quiet",
    }


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_tmux_itself_runs_and_stops_the_command(cloud):
    tmux = f'#!/bin/bash\nTMUX_TMPDIR=$HOME exec {shutil.which("tmux")} "$@"\n'
    cloud.write("worker_bin/tmux", tmux)
    check(cloud.launch("create", *SLICE))
    check(cloud.launch("setup", *SLICE))
    (cloud.path / "hold").touch()
    check(cloud.launch("run", *SLICE, "--", *TRAIN))
    wait_for(cloud.slice / "0/cwd.txt")
    assert cloud.got() == TRAIN
    assert ": running" in check(cloud.launch("status", *SLICE)).stdout
    check(cloud.launch("stop", *SLICE))
    assert ": stopped" in check(cloud.launch("status", *SLICE)).stdout
    (cloud.path / "hold").unlink()
    check(cloud.launch("run", *SLICE, "--", *TRAIN))
    assert check(cloud.launch("logs", *SLICE)).stdout == f"step 1 on {cloud.slice / '0'}\n"


def test_a_slice_that_is_there_is_used(cloud):
    check(cloud.launch("create", *SLICE))
    check(cloud.launch("create", *SLICE))
    assert cloud.verbs.count("tpu-vm create") == 1


def test_create_waits_until_the_slice_is_ready(cloud):
    (cloud.path / "after/tpu-vm.txt").write_text("CREATING CREATING READY")
    result = check(cloud.launch("create", *SLICE))
    assert cloud.verbs.count("tpu-vm describe") == 4
    assert result.stdout.count("CREATING") == 1
    assert result.stdout.splitlines()[-1] == "# tune is ready"


def test_queued_resource_is_waited_for(cloud):
    (cloud.path / "after/queued-resources.txt").write_text("WAITING_FOR_RESOURCES ACTIVE")
    result = check(cloud.launch("create", *SLICE, "--queued", "--spot", "--project=mine"))
    create = cloud.calls[cloud.verbs.index("queued-resources create")]
    assert create[2] == "tune"
    assert flags_of(create) == {
        "--node-id=tune",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
        "--zone=us-west4-a",
        "--project=mine",
        "--quiet",
    }
    assert "WAITING_FOR_RESOURCES" in result.stdout
    assert "tpu-vm create" not in cloud.verbs

    check(cloud.launch("delete", *SLICE[:2]))
    assert "queued-resources delete" in cloud.verbs
    assert not list((cloud.path / "states").iterdir())


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5e-8", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_runtime_fits_the_type(cloud, kind, runtime):
    check(cloud.launch("create", *SLICE[:2], TPU_TYPE=kind))
    create = cloud.calls[cloud.verbs.index("tpu-vm create")]
    assert f"--version={runtime}" in create
    assert f"--accelerator-type={kind.replace('v5e', 'v5litepod')}" in create


def test_setup_brings_the_checkout_and_keeps_what_runs_left(cloud):
    check(cloud.launch("create", *SLICE))
    check(cloud.launch("setup", *SLICE))
    there = cloud.slice / "0/alignprop_jax"
    assert (there / "configs/a b.py").read_text() == "configs/a b.py"
    assert not any((there / name).exists() for name in (".git", ".venv/old", "runs"))

    (there / "runs").mkdir()
    (there / "runs/log").write_text("mine")
    (cloud.checkout / "configs/a b.py").rename(cloud.checkout / "configs/c.py")
    check(cloud.launch("setup", *SLICE))
    assert (there / "runs/log").read_text() == "mine"
    assert sorted(path.name for path in (there / "configs").iterdir()) == ["c.py"]
    assert len((cloud.slice / "0/pip.txt").read_text().splitlines()) == 1


def test_secrets_arrive_and_are_seen_nowhere(cloud):
    cloud.write("workers.txt", "2")
    (cloud.path / "hold").touch()
    check(cloud.launch("create", *SLICE))
    check(cloud.launch("setup", *SLICE))
    spoken = check(cloud.launch("run", *SLICE, "--", *TRAIN, **SECRETS))
    wait_for(cloud.slice / "1/cwd.txt")
    for worker in ("0", "1"):
        home = cloud.slice / worker
        assert (home / "secrets_seen.txt").read_text() == ",".join(SECRETS.values()) + "\n"
        assert not (home / ".alignprop_jax/secrets").exists()
        assert stat.S_IMODE((home / ".alignprop_jax").stat().st_mode) == 0o700
        leader = (home / "tmux.pid").read_text().strip()
        command_line = Path(f"/proc/{leader}/cmdline").read_bytes().decode()
        seen = command_line + (home / "tmux.bin").read_text()
        seen += (home / ".alignprop_jax/command").read_text()
        assert not any(secret in seen for secret in ("hf_secret", "wandb secret"))
    recorded = (cloud.path / "calls.bin").read_text()
    for text in (recorded, spoken.stdout, spoken.stderr):
        assert not any(secret in text for secret in ("hf_secret", "wandb secret"))


def test_secrets_travel_in_a_file_of_mode_600(cloud):
    check(cloud.launch("create", *SLICE))
    check(cloud.launch("setup", *SLICE))
    # Nothing starts, so the file stays.
    (cloud.path / "worker_bin/tmux").write_text("#!/bin/bash\nexit 1\n")
    assert cloud.launch("run", *SLICE, "--", "true", **SECRETS).returncode != 0
    sent = cloud.slice / "0/.alignprop_jax/secrets"
    assert stat.S_IMODE(sent.stat().st_mode) == 0o600


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.05)


@pytest.mark.parametrize("options", [(), ("--queued", "--spot")], ids=["direct", "queued"])
def test_preempted_slice_is_replaced_and_the_command_started_again(cloud, options):
    (cloud.path / "after/queued-resources.txt").write_text("PROVISIONING ACTIVE")
    (cloud.path / "preempt").touch()
    result = check(cloud.launch("up", *SLICE, *options, "--", *TRAIN, **SECRETS))
    group = "queued-resources" if options else "tpu-vm"
    verbs = [verb for verb in cloud.verbs if verb.split()[1] in ("create", "delete")]
    assert verbs == [f"{group} create", f"{group} delete", f"{group} create"]
    assert "# restart 1 of at most 10" in result.stdout
    assert cloud.got() == TRAIN
    assert (cloud.slice / "0/secrets_seen.txt").read_text() == ",".join(SECRETS.values()) + "\n"


def test_a_signal_that_comes_with_a_preemption_is_no_failure(cloud):
    """The run ends with 143 both times: as its slice goes, and then on one that is healthy."""
    (cloud.path / "exit_code").write_text("143")
    (cloud.path / "preempt").touch()
    result = cloud.launch("up", *SLICE, "--", *TRAIN)
    assert "# restart 1 of at most 10" in result.stdout
    assert "# restart 2" not in result.stdout
    assert "error: the command exited 143 on worker 0 of tune" in result.stderr


def test_restarts_are_bounded(cloud):
    (cloud.path / "preempt").touch()
    result = cloud.launch("up", *SLICE, "--max_restarts=0", "--", *TRAIN)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: tune was interrupted more than")
    assert cloud.verbs.count("tpu-vm create") == 1


@pytest.mark.parametrize("name", ["max_restarts", "poll_seconds"])
def test_numbers_are_decimal(cloud, name):
    check(cloud.launch("create", *SLICE, f"--{name}=08"))
    for value in ("", "x", "-1", "1.5", "9" * 30, "1 1", "0x10"):
        result = cloud.launch("create", *SLICE, f"--{name}={value}")
        assert result.returncode == 2
        assert f"error: --{name}={value} is not a number below a billion" in result.stderr


def test_a_restart_of_08_is_the_eighth(cloud):
    (cloud.path / "preempt").touch()
    result = check(cloud.launch("up", *SLICE, "--max_restarts=08", "--", *TRAIN))
    assert "# restart 1 of at most 8" in result.stdout


@pytest.mark.parametrize("state", ["PREEMPTED", "ABSENT"])
def test_a_state_that_stays_is_looked_at_in_peace_and_not_for_ever(cloud, state):
    """Deleted or created with success again and again, and nothing comes of it."""
    (cloud.path / "stays").touch()
    (cloud.path / "after/tpu-vm.txt").write_text("ABSENT")
    if state != "ABSENT":
        (cloud.path / "states/tpu-vm.txt").write_text(state)
    cloud.write("bin/sleep", f'#!/bin/bash\necho "$1" >>"{cloud.path}/slept.txt"\n')
    result = cloud.launch("create", *SLICE[:3], "--poll_seconds=7", "--max_restarts=3")
    assert result.returncode == 1
    assert "error: tune was interrupted more than --max_restarts=3 times" in result.stderr
    assert (cloud.path / "slept.txt").read_text().split() == ["7"] * 3
    verb = "tpu-vm delete" if state == "PREEMPTED" else "tpu-vm create"
    assert cloud.verbs.count(verb) == 4


def test_restarted_machine_gets_the_command_again(cloud):
    check(cloud.launch("create", *SLICE))
    check(cloud.launch("setup", *SLICE))
    check(cloud.launch("run", *SLICE, "--", "false"))
    check(cloud.launch("logs", *SLICE))
    # As after a power cut: it never came to a result.
    (cloud.slice / "0/.alignprop_jax/result").write_text("interrupted\n")
    status = check(cloud.launch("status", *SLICE))
    assert "# tune is READY" in status.stdout and ": interrupted" in status.stdout
    check(cloud.launch("up", *SLICE, "--", *TRAIN))
    assert cloud.got() == TRAIN


def test_failed_command_is_not_tried_again(cloud):
    (cloud.path / "exit_code").write_text("3")
    result = cloud.launch("up", *SLICE, "--", *TRAIN)
    assert result.returncode == 1
    assert "error: the command exited 3 on worker 0 of tune" in result.stderr
    assert "tpu-vm delete" not in cloud.verbs


def test_up_joins_a_command_that_runs_and_refuses_another(cloud):
    (cloud.path / "hold").touch()
    check(cloud.launch("create", *SLICE))
    check(cloud.launch("setup", *SLICE))
    check(cloud.launch("run", *SLICE, "--", *TRAIN))
    other = cloud.launch("up", *SLICE, "--", "true")
    assert other.returncode == 1 and "error: another command is running" in other.stderr
    copies = cloud.verbs.count("tpu-vm scp")

    status = check(cloud.launch("status", *SLICE))
    assert ": running" in status.stdout
    check(cloud.launch("stop", *SLICE))
    assert ": stopped" in check(cloud.launch("status", *SLICE)).stdout
    assert cloud.verbs.count("tpu-vm scp") == copies
    log = check(cloud.launch("logs", *SLICE)).stdout
    assert log == f"step 1 on {cloud.slice / '0'}\n"


def test_setup_does_not_change_code_under_a_running_command(cloud):
    (cloud.path / "hold").touch()
    check(cloud.launch("create", *SLICE))
    check(cloud.launch("setup", *SLICE))
    check(cloud.launch("run", *SLICE, "--", *TRAIN))
    result = cloud.launch("setup", *SLICE)
    assert result.returncode == 1 and "stop it before setting up" in result.stderr


def test_delete_of_nothing_is_fine(cloud):
    result = check(cloud.launch("delete", *SLICE[:2]))
    assert result.stdout == "# there is no tune in us-west4-a\n"


def test_gcloud_error_is_not_taken_for_an_absent_slice(cloud):
    (cloud.path / "fail/describe").write_text("ERROR: PERMISSION_DENIED")
    result = cloud.launch("create", *SLICE)
    assert result.returncode == 1
    assert result.stderr == (
        "ERROR: PERMISSION_DENIED\nerror: gcloud cannot tell the state of tune in us-west4-a\n"
    )
    assert "tpu-vm create" not in cloud.verbs


def test_no_capacity_is_one_clear_line(cloud):
    (cloud.path / "fail/create").write_text("ERROR: There is no more capacity in the zone")
    result = cloud.launch("create", *SLICE)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "error: tune was not created; when there is no capacity, --queued waits for it"
    )


def test_dry_run_calls_nothing_and_prints_what_a_shell_can_run(cloud):
    cloud.write("workers.txt", "2")
    dry = check(cloud.launch("up", *SLICE, "--dry_run", "--", *TRAIN, **SECRETS))
    assert cloud.calls == []
    assert not any(secret in dry.stdout for secret in ("hf_secret", "wandb secret"))
    pasted = subprocess.run(
        ["bash"],
        input=dry.stdout,
        cwd=cloud.path,
        env=cloud.environment(**SECRETS),
        capture_output=True,
        text=True,
    )
    assert pasted.returncode == 0, pasted.stderr
    assert cloud.got(1) == TRAIN


@pytest.mark.parametrize(
    "subcommand", ["create", "setup", "logs", "status", "stop", "delete", "run", "up"]
)
def test_every_dry_run_calls_nothing(cloud, subcommand):
    command = ["--", "true"] if subcommand in ("run", "up") else []
    result = check(cloud.launch(subcommand, *SLICE, "--dry_run", *command))
    assert "gcloud compute tpus" in result.stdout
    assert cloud.calls == []


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ((), "a subcommand is missing"),
        (("fly", *SLICE), "unknown subcommand fly"),
        (("create", *SLICE[1:]), "--name is missing"),
        (("create", "--name=A_b", *SLICE[1:]), "--name=A_b"),
        (("create", SLICE[0], *SLICE[2:]), "--zone is missing"),
        (("create", *SLICE[:2]), "--type is missing"),
        (("create", *SLICE[:2], "--type=tpu7x-8"), "--type=tpu7x-8"),
        (("create", *SLICE, "--sport"), "unknown option --sport"),
        (("create", *SLICE, "--project"), "--project needs a value"),
        (("create", *SLICE, "--poll_seconds=soon"), "--poll_seconds=soon"),
        (("create", *SLICE, "--", "true"), "create takes no command"),
        (("up", *SLICE), "the command to run is missing"),
        (("run", *SLICE, "--"), "the command to run is missing"),
        (("logs", *SLICE, "--worker=first"), "--worker=first"),
    ],
)
def test_wrong_use_is_one_line_that_names_the_culprit(cloud, arguments, culprit):
    result = cloud.launch(*arguments)
    assert result.returncode == 2
    assert result.stdout == "" and cloud.calls == []
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert culprit in result.stderr


def test_options_come_from_the_environment(cloud):
    variables = {"TPU_NAME": "tune", "TPU_ZONE": "us-west4-a", "TPU_TYPE": "v6e-8", "TPU_SPOT": "1"}
    result = check(cloud.launch("create", "--dry_run", "--type", "v4-8", **variables))
    assert "create tune --accelerator-type=v4-8 --version=tpu-ubuntu2204-base --spot" in (
        result.stdout
    )
    wrong = cloud.launch("create", **(variables | {"TPU_SPOT": "yes"}))
    assert wrong.returncode == 2 and "--spot is 1 or 0, not yes" in wrong.stderr


def test_missing_gcloud_is_one_line(cloud):
    (cloud.path / "bin/gcloud").unlink()
    for program in ("bash", "dirname"):
        os.symlink(shutil.which(program), cloud.path / "bin" / program)
    result = subprocess.run(
        [shutil.which("bash"), cloud.checkout / "launch/tpu_vm.sh", "create", *SLICE],
        env={"PATH": str(cloud.path / "bin")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr == "error: gcloud is needed: https://cloud.google.com/sdk/docs/install\n"


def test_workdir_on_the_slice_is_said(cloud):
    command = ("--", "python", "--workdir", "runs/x")
    assert (
        "runs/x is on the slice and goes with it"
        in check(cloud.launch("run", *SLICE, "--dry_run", *command)).stdout
    )
    assert (
        "goes with it"
        not in check(
            cloud.launch("run", *SLICE, "--dry_run", "--", "python", "--workdir=gs://b/x")
        ).stdout
    )


def test_help_names_every_subcommand_and_option(cloud):
    text = check(cloud.launch("--help")).stdout
    script = (ROOT / "launch/tpu_vm.sh").read_text()
    options = set(re.findall(r"(--[a-z_]+)=\*(?! \]\])", script)) | {
        "--spot",
        "--queued",
        "--dry_run",
    }
    assert len(options) == 11
    for word in [*options, "up", "create", "setup", "run", "logs", "status", "stop", "delete"]:
        assert re.search(rf"^  {word}\b", text, re.MULTILINE), word
