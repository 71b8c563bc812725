"""Real processes on this machine, connected as hosts of a cluster are."""

import fcntl
import os
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from alignprop_jax.devices import distributed
from alignprop_jax.errors import UserError
from tests import nano_run

NUM_STEPS = 60


def start(config, workdirs, *arguments):
    """Starts training in as many processes as there are workdirs; they find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            nano_run.command("train", config, workdir, *arguments),
            env={
                **os.environ,
                distributed.ADDRESS: address,
                distributed.COUNT: str(len(workdirs)),
                distributed.ID: str(number),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, workdir in enumerate(workdirs)
    ]


def finish(processes, timeout=1800):
    """Returns what each process printed, and its errors, when all have ended."""
    try:
        return [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def said_by_us(printed):
    """Returns what a process printed, without the greetings of the network library."""
    return [line for line in printed.splitlines() if not line.startswith("[Gloo]")]


def wait_for_steps(workdir, processes, number):
    while len(nano_run.read_lines(workdir / "metrics.jsonl")) < number:
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.005)


@pytest.mark.slow
def test_two_processes_train_as_one_through_sigterm_and_kill(nano_config, tmp_path):
    settings = (f"--config.train.num_steps={NUM_STEPS}", "--config.checkpoint.every=20")
    settings += ("--config.logging.image_every=40",)
    alone, together = tmp_path / "alone", tmp_path / "together"

    # A signal to one of them: both stop after the same step, with a checkpoint of it.
    stopped = 0
    for number, to in ((signal.SIGTERM, 1), (signal.SIGINT, 0)):
        before = stopped
        processes = start(nano_config, [together] * 2, *settings)
        wait_for_steps(together, processes, before + 3)
        processes[to].send_signal(number)
        (printed, _), (silent, _) = finish(processes)
        assert [process.returncode for process in processes] == [128 + number] * 2
        stopped = len(nano_run.read_lines(together / "metrics.jsonl"))
        assert before + 3 <= stopped < NUM_STEPS
        assert f"stopped after step {stopped};" in printed
        assert not said_by_us(silent)

    # One dies: the other says so, and does not wait for it.
    processes = start(nano_config, [together] * 2, *settings)
    wait_for_steps(together, processes, stopped + 3)
    processes[1].kill()
    began = time.monotonic()
    (_, errors), _ = finish(processes, timeout=60)
    assert time.monotonic() - began < 60
    assert processes[0].returncode not in (0, None)
    assert "process 0 of 2 ends by" in errors or "another task died" in errors
    assert not (together / "summary.json").exists()

    # Started again, they finish what one process would have done in one go.
    processes = start(nano_config, [together] * 2, *settings)
    (printed, errors), (silent, _) = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert "resumed after step" in printed and "on 2 cpu device(s)" in printed
    assert not said_by_us(silent)
    process = nano_run.run("train", nano_config, alone, *settings)
    assert process.returncode == 0, process.stderr
    for name in ("metrics.jsonl", "eval.jsonl"):
        records, expected = (nano_run.read_records(path / name) for path in (together, alone))
        assert [record["step"] for record in records] == [record["step"] for record in expected]
        for record, wanted in zip(records, expected, strict=True):
            np.testing.assert_allclose(record["reward_mean"], wanted["reward_mean"], atol=1e-4)
    files, expected = (set(nano_run.read_tree(path)) for path in (together, alone))
    assert {name for name in files if not name.startswith("checkpoints")} == {
        name for name in expected if not name.startswith("checkpoints")
    }


def test_two_processes_learn_together_that_the_folder_is_in_use(nano_config, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with (workdir / ".lock").open("w") as file:
        file.write('{"process": 7, "host": "another", "since": "today"}')
        file.flush()
        fcntl.lockf(file, fcntl.LOCK_EX)
        processes = start(nano_config, [workdir] * 2)
        for number, (_, errors) in enumerate(finish(processes)):
            assert processes[number].returncode == 1
            assert f"error: process {number} of 2: workdir " in errors
            assert "is in use by process 7 on host another since today;" in errors


def test_hosts_that_do_not_share_the_workdir_are_told(nano_config, tmp_path):
    processes = start(nano_config, [tmp_path / "a", tmp_path / "b"])
    for number, (_, errors) in enumerate(finish(processes)):
        assert processes[number].returncode == 1
        assert f"error: process {number} of 2: workdir " in errors
        assert "is not the same on all hosts; give --workdir a bucket" in errors


@pytest.fixture
def initialized(monkeypatch):
    """What jax.distributed.initialize was called with, if it was."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs))
    for name in (distributed.ADDRESS, distributed.COUNT, distributed.ID):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_one_host_needs_no_connection(initialized):
    distributed.initialize()
    assert initialized == []
    assert distributed.is_main()
    assert distributed.from_main({"a": 1}) == {"a": 1}
    assert distributed.all_agree(True) and not distributed.all_agree(False)


def test_a_tpu_host_asks_jax_for_its_pod(initialized, monkeypatch):
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        distributed.initialize()
    finally:
        jax.config.update("jax_platforms", "cpu")
    assert [call.keys() for call in initialized] == [{"heartbeat_timeout_seconds"}]


def test_variables_say_who_takes_part(initialized, monkeypatch):
    monkeypatch.setenv(distributed.ADDRESS, "host:1234")
    monkeypatch.setenv(distributed.COUNT, "4")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is set without JAX_PROCESS_ID"):
        distributed.initialize()
    monkeypatch.setenv(distributed.ID, "three")
    for number in ("three", "4", "-1", "1_0", "\u0663", "9" * 5000):
        monkeypatch.setenv(distributed.ID, number)
        with pytest.raises(UserError, match=f"JAX_PROCESS_ID='{number[:3]}.* a number from 0 to 3"):
            distributed.initialize()
    monkeypatch.setenv(distributed.COUNT, "0")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='0' must be a number from 1 to"):
        distributed.initialize()
    for address in ("host", "host:", ":1", "a host:1", "host:0", "host:65536", "host:\u0663"):
        monkeypatch.setenv(distributed.ADDRESS, address)
        with pytest.raises(UserError, match=f"JAX_COORDINATOR_ADDRESS='{address}' must be HOST:"):
            distributed.initialize()
    monkeypatch.setenv(distributed.ADDRESS, "host:1234")
    monkeypatch.setenv(distributed.COUNT, "4")
    monkeypatch.setenv(distributed.ID, "three")
    with pytest.raises(UserError, match="JAX_PROCESS_ID='three' must be a number"):
        distributed.initialize()
    monkeypatch.setenv(distributed.ID, "3")
    distributed.initialize()
    (call,) = initialized
    assert (call["num_processes"], call["process_id"]) == (4, 3)


def test_only_the_main_process_writes(monkeypatch):
    written = []
    write = distributed.on_main(written.append)
    write(1)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(2)
    assert written == [1]
