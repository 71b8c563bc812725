"""Tiny programs with the real handler are sent signals at chosen moments."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

PROGRAM = """
import gc, os, sys, threading, time
from absl import flags
from alignprop_jax.process import signals
from alignprop_jax.errors import UserError, run_program

flags.DEFINE_string("do", None, "what to be found at")

def say(what):
    print(what, flush=True)

def sleep():
    say("ready")
    time.sleep(60)

def callback():
    "An exception that comes up there is printed and lost."
    gc.callbacks.append(lambda *_: say("ready") or time.sleep(1.5))
    gc.collect()
    gc.callbacks.clear()
    time.sleep(60)

def compute():
    "The main thread is in C, as it is while XLA compiles, for longer than the test has."
    import hashlib
    say("ready")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)

def fail_at_the_end():
    "What the last acts take away is missing where the main thread is."
    gone = threading.Event()
    signals.at_end(lambda: (gone.set(), time.sleep(0.3)))
    say("ready")
    gone.wait()
    raise UserError("a folder is gone")

def hang_at_the_end():
    signals.at_end(lambda: time.sleep(60))
    sleep()

def steps():
    "Training: the step that runs is finished."
    signals.at_end(lambda: say("last act"))
    with signals.deferred() as received:
        for step in range(100):
            if step == 0:
                say("ready")
            time.sleep(0.5)
            if number := received():
                say(f"saved step {step}")
                signals.exit_by(number)

def last_step():
    "The signal comes when it has been asked for the last time."
    signals.at_end(lambda: say("last act"))
    with signals.deferred() as received:
        assert not received()
        say("ready")
        while not received():
            time.sleep(0.05)
    say("never")

def lost_pipe():
    "An event loop of a library has its own."
    import signal
    signal.set_wakeup_fd(-1)
    sleep()

def fork():
    "The child's signals are its own."
    import multiprocessing, signal
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join(10)
    say(f"child {child.exitcode}")
    time.sleep(0.5)
    sleep()

run_program(lambda argv: globals()[flags.FLAGS.do]())
"""


def start(moment):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), f"--do={moment}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line == "ready\n":
            return process
    raise AssertionError(process.stderr.read())


def finish(process, timeout=10):
    try:
        return process.communicate(timeout=timeout)
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "moment",
    ["sleep", "callback", "compute", "fail_at_the_end", "last_step", "lost_pipe", "fork"],
)
def test_the_first_signal_ends_the_program_in_one_line(moment, number):
    process = start(moment)
    process.send_signal(number)
    began = time.monotonic()
    printed, errors = finish(process)
    assert time.monotonic() - began < 5
    assert errors == f"interrupted by {number.name}\n"
    assert process.returncode == 128 + number
    assert printed == ("last act\n" if moment == "last_step" else "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_steps_end_at_their_boundary(number):
    process = start("steps")
    process.send_signal(number)
    printed, errors = finish(process)
    assert (printed, errors) == ("saved step 0\n", "")
    assert process.returncode == 128 + number


@pytest.mark.parametrize("moment", ["steps", "hang_at_the_end"])
def test_the_second_signal_ends_the_program_at_once(moment):
    process = start(moment)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    printed, errors = finish(process)
    assert time.monotonic() - began < 0.3
    assert (printed, errors, process.returncode) == ("", "", 143)


def test_one_signal_sent_twice_is_one():
    process = start("steps")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert finish(process)[0] == "saved step 0\n"


def test_an_ignored_signal_stays_ignored():
    """As for a command that a script runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start("sleep")
    finally:
        signal.signal(signal.SIGINT, before)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[1] == "interrupted by SIGTERM\n"


@pytest.mark.slow
def test_a_hanging_last_act_does_not_keep_the_program():
    process = start("hang_at_the_end")
    process.send_signal(signal.SIGTERM)
    assert finish(process, timeout=20)[1] == "interrupted by SIGTERM\n"
    assert process.returncode == 143


@pytest.mark.parametrize("program", ["train", "evaluate", "sample", "plan", "merge", "compare"])
def test_programs_answer_while_they_import(program):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", f"alignprop_jax.{program}", "--help"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "| numpy" in line.replace("  ", ""):
            break
    process.send_signal(signal.SIGINT)
    # Python may say of another import while the program ends.
    assert "interrupted by SIGINT\n" in finish(process)[1]
    assert process.returncode == 130


def test_a_library_leaves_the_signals_alone():
    code = "import signal, alignprop_jax.process.signals; print(signal.getsignal(signal.SIGINT))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "default_int_handler" in printed


PARENT = """
import sys
from alignprop_jax.process.children import run_child
from alignprop_jax.errors import run_program

run_program(lambda argv: print(run_child([sys.executable, "-c", sys.stdin.read()]).returncode))
"""
CHILD = """
import os, signal, sys, time

def stop(number, frame):
    print("saved", flush=True)
    time.sleep(0.3)
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, stop)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def parent_and_child():
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(CHILD)
    process.stdin.close()
    process.stdin = None
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.communicate()
    if is_running(child):
        os.kill(child, signal.SIGKILL)


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has it")
def test_a_child_ends_with_a_parent_that_is_killed(parent_and_child):
    process, child = parent_and_child
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while is_running(child):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_child_is_given_the_signal_and_ends_first(parent_and_child):
    process, child = parent_and_child
    process.terminate()
    printed, errors = finish(process)
    assert (printed, errors) == ("saved\n", "interrupted by SIGTERM\n")
    assert process.returncode == 143
    assert not is_running(child)


def test_a_command_that_cannot_be_run_says_so():
    process = subprocess.run(
        [sys.executable, "-c", PARENT.replace("sys.executable", "'/no/such'")],
        input="",
        capture_output=True,
        text=True,
    )
    assert process.stdout == "1\n"
    assert process.stderr == "/no/such cannot be run (No such file or directory)\n"
