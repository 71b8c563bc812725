"""Processes that want the same folder: on a disk, in a bucket, and one that died with the lock."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import fsspec
import pytest

from alignprop_jax.compare import compare
from alignprop_jax.config import load_config
from alignprop_jax.devices import distributed
from alignprop_jax.errors import UserError
from alignprop_jax.evaluate import evaluate
from alignprop_jax.lora.mixing import LoraMix
from alignprop_jax.records import lock
from alignprop_jax.records.lock import FileLock, ObjectLock, locked, open_lock
from alignprop_jax.sweep import sweep
from alignprop_jax.train import train
from alignprop_jax.trials.runs import Budget
from tests import nano_run

BUDGET = Budget(queries=1000, evaluations=1)
KINDS = {"file": FileLock, "object": ObjectLock}


@pytest.fixture
def quick(monkeypatch):
    """Signs of life, and patience with who gives none, a hundredth of those of a run."""
    monkeypatch.setattr(lock, "_SECONDS_BETWEEN_SIGNS", 0.15)
    monkeypatch.setattr(lock, "_SECONDS_OF_A_DEAD", 0.6)
    monkeypatch.setattr(lock, "_SECONDS_TO_SETTLE", 0.05)


def test_a_file_that_its_holder_has_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    path, take = tmp_path / ".lock", lock.fcntl.lockf

    def released_before(file, how):
        monkeypatch.setattr(lock.fcntl, "lockf", take)
        path.unlink()
        take(file, how)

    monkeypatch.setattr(lock.fcntl, "lockf", released_before)
    mine = FileLock(path)
    assert mine.take() is None
    assert path.exists()
    mine.release()


HOLDER = """
import sys, time
from alignprop_jax.records import lock
path, kind = sys.argv[1:]
lock._SECONDS_BETWEEN_SIGNS = 0.15
assert getattr(lock, kind)(lock.Path(path)).take() is None
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold():
    """Starts a process that takes a lock and keeps it."""
    processes = []

    def start(kind, path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path), KINDS[kind].__name__],
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "taken\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_has_it_until_it_lets_go(kind, tmp_path, hold):
    path = tmp_path / ".lock"
    process = hold(kind, path)
    holder = KINDS[kind](path).take()
    assert holder["process"] == process.pid
    assert holder["host"] == os.uname().nodename
    assert holder["since"].startswith("20") and holder["since"].endswith(" UTC")


@pytest.mark.parametrize("kind", KINDS)
def test_the_lock_of_a_killed_process_is_taken_over_at_once(kind, tmp_path, hold, quick):
    path = tmp_path / ".lock"
    process = hold(kind, path)
    process.kill()
    began = time.monotonic()
    while is_running(process.pid):
        time.sleep(0.001)
    mine = KINDS[kind](path)
    assert mine.take() is None  # Not reaped yet.
    assert time.monotonic() - began < 0.5
    assert json.loads(path.read_text())["process"] == os.getpid()
    mine.release()
    assert not path.exists()


def is_running(process):
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_a_number_that_another_process_has_got_since_fools_nobody(tmp_path, capsys):
    path = tmp_path / ".lock"
    path.write_text(json.dumps(lock._own_record() | {"started": 1}))
    assert ObjectLock(path).take() is None
    assert capsys.readouterr().out == ""


def test_a_process_of_another_host_shows_that_it_lives(tmp_path, hold, quick, monkeypatch, capsys):
    path = tmp_path / ".lock"
    process = hold("object", path)
    monkeypatch.setattr(lock, "_machine", lambda: "another")
    assert ObjectLock(path).take()["process"] == process.pid
    assert "waiting for a sign of life of process" in capsys.readouterr().out
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.3)  # So it may be caught while it writes.
    mine = ObjectLock(path)
    assert mine.take() is None
    assert json.loads(path.read_text())["process"] == os.getpid()
    mine.release()


def test_who_lost_the_lock_ends(tmp_path, hold):
    path = tmp_path / ".lock"
    process = hold("object", path)
    process.stderr = None
    path.write_text(json.dumps(lock._own_record()))
    assert process.wait(5) == 1
    assert path.exists()


def contend(kind, path, barrier, results, rounds):
    lock._SECONDS_TO_SETTLE = 0.2
    for number in range(rounds):
        barrier.wait()
        mine = KINDS[kind](path.with_name(f".lock{number}"))
        results.put((number, mine.take() is None))
        barrier.wait()
        mine.release()


@pytest.mark.parametrize("kind, left_by_a_dead_one", [("file", True), ("object", False)])
def test_of_two_at_the_same_instant_one_wins(kind, left_by_a_dead_one, tmp_path):
    check_contenders(kind, left_by_a_dead_one, tmp_path, rounds=20)


@pytest.mark.slow
def test_of_two_that_take_over_one_wins(tmp_path):
    check_contenders("object", True, tmp_path, rounds=20)


def check_contenders(kind, left_by_a_dead_one, folder, rounds):
    if left_by_a_dead_one:
        for number in range(rounds):
            record = lock._own_record() | {"started": 1}
            (folder / f".lock{number}").write_text(json.dumps(record))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (kind, folder / ".lock", barrier, results, rounds)
    processes = [context.Process(target=contend, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    won = [results.get(timeout=60) for _ in range(2 * rounds)]
    for process in processes:
        process.join(30)
    assert sorted(won) == sorted((n, wins) for n in range(rounds) for wins in (False, True))
    assert not list(folder.iterdir())


def test_a_second_run_is_refused_in_one_line(tmp_path, hold):
    process = hold("file", tmp_path / ".lock")
    with pytest.raises(UserError) as error, locked(tmp_path):
        pass
    assert str(error.value).startswith(
        f"workdir '{tmp_path}' is in use by process {process.pid} on host {os.uname().nodename} "
        "since 20"
    )
    assert str(error.value).endswith(" UTC; wait for it or end it, or give another --workdir")
    process.kill()
    process.wait()
    with pytest.raises(ValueError), locked(tmp_path):
        assert (tmp_path / ".lock").exists()
        raise ValueError
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("program", ["train", "evaluate", "sweep", "compare"])
def test_what_writes_in_a_workdir_locks_it(program, nano_config, tmp_path, hold):
    process = hold("file", tmp_path / ".lock")
    config = load_config(str(nano_config))
    calls = {
        "train": lambda: train(config, tmp_path),
        "evaluate": lambda: evaluate(config, tmp_path, LoraMix(("none",))),
        "sweep": lambda: sweep(config, tmp_path, ["lora.safetensors"]),
        "compare": lambda: compare(tmp_path, "configs/emoji.py", ["count"], ["ddpo"], 1, BUDGET),
    }
    before = nano_run.read_tree(tmp_path)
    with pytest.raises(UserError, match=f"is in use by process {process.pid} on host "):
        calls[program]()
    assert nano_run.read_tree(tmp_path) == before


def test_a_signal_takes_the_lock_away(tmp_path):
    code = (
        "import sys, time; from alignprop_jax.errors import run_program\n"
        "from alignprop_jax.records.lock import locked\n"
        "def main(argv):\n    with locked(sys.orig_argv[-1]):\n"
        "        print(flush=True); time.sleep(60)\n"
        "sys.argv = sys.argv[:1]; run_program(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    assert (tmp_path / ".lock").exists()
    process.terminate()
    assert process.wait(10) == 143
    process.stdout.close()
    assert not (tmp_path / ".lock").exists()


def test_a_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot be locked .Is a directory.; give another"):
        with locked(tmp_path):
            pass


def test_a_disk_without_locks_is_locked_as_a_bucket(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    began = time.monotonic()
    first = FileLock(tmp_path / ".lock")
    assert first.take() is None
    assert FileLock(tmp_path / ".lock").take()["process"] == os.getpid()
    assert time.monotonic() - began < 1
    first.release()
    assert not list(tmp_path.iterdir())


def test_hosts_hear_from_the_main_process_whether_it_has_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "is_main", lambda: False)
    monkeypatch.setattr(lock, "from_main", lambda problem: "is in use")
    with pytest.raises(UserError, match="is in use"), locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir()) and distributed.is_main()


def test_a_bucket(bucket, quick):
    fsspec.filesystem("gs").mkdir("bucket/run")
    with locked("gs://bucket/run"):
        first = json.loads(bucket["/bucket/run/.lock"].getvalue())
        assert first["process"] == os.getpid()
        with pytest.raises(UserError, match="workdir 'gs://bucket/run' is in use by process"):
            with locked("gs://bucket/run"):
                pass
        time.sleep(0.5)
        assert json.loads(bucket["/bucket/run/.lock"].getvalue())["signs"] > 0
    assert "/bucket/run/.lock" not in bucket
    time.sleep(0.3)
    assert "/bucket/run/.lock" not in bucket
    assert isinstance(open_lock("gs://bucket/run"), ObjectLock)
