"""A stand-in for gcloud, with a slice of machines that are folders.

Run as `gcloud compute tpus GROUP VERB NAME FLAGS`, with the folder of the cloud in $FAKE_CLOUD:

  calls.bin           the arguments of every call, each ended by NUL, each call by another one
  workers.txt         how many workers a slice has, 1 unless it is there
  states/GROUP.txt    the states of the resource, a line each, that describe goes through; the last
                      one stays, and without the file the resource is absent
  after/GROUP.txt     the states that it goes through once created; READY unless it is there, and
                      with ABSENT in it, create succeeds and nothing comes
  stays               delete succeeds and nothing goes
  fail/VERB           makes the next call with this verb fail, with the text in the file
  preempt             preempts the slice when its log is next followed, and is removed
  slice/N             the home of worker N; a command for it is run there by bash
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ.get("FAKE_CLOUD", ""))
SLICE = CLOUD / "slice"


def main(arguments: list[str]) -> int:
    with (CLOUD / "calls.bin").open("a") as calls:
        calls.write("".join(f"{argument}\0" for argument in arguments) + "\0")
    assert arguments[:2] == ["compute", "tpus"] and "--zone=us-west4-a" in arguments
    group, verb, *rest = arguments[2:]
    flags = dict(word[2:].partition("=")[::2] for word in rest if word.startswith("--"))
    words = [word for word in rest if not word.startswith("--")]
    failure = CLOUD / "fail" / verb
    if failure.exists():
        print(failure.read_text(), file=sys.stderr)
        failure.unlink()
        return 1
    return {
        "describe": describe,
        "create": create,
        "delete": delete,
        "scp": scp,
        "ssh": ssh,
    }[verb](group, words, flags)


def states(group: str) -> Path:
    return CLOUD / "states" / f"{group}.txt"


def describe(group: str, words: list[str], flags: dict[str, str]) -> int:
    if not states(group).exists():
        print(f"ERROR: ({group}) NOT_FOUND: Resource '{words[0]}' was not found", file=sys.stderr)
        return 1
    state, *rest = states(group).read_text().split()
    assert (
        flags["format"]
        == {
            "tpu-vm": "value(state)",
            "queued-resources": "value(state.state)",
        }[group]
    )
    if rest:
        states(group).write_text("\n".join(rest))
        if group == "queued-resources" and rest == ["ACTIVE"]:
            boot()
    print(state)
    return 0


def create(group: str, words: list[str], flags: dict[str, str]) -> int:
    if states(group).exists():
        print("ERROR: ALREADY_EXISTS", file=sys.stderr)
        return 1
    after = CLOUD / "after" / f"{group}.txt"
    coming = after.read_text() if after.exists() else "READY"
    if coming == "ABSENT":
        return 0
    states(group).write_text(coming)
    if group == "tpu-vm":
        boot()
    return 0


def boot() -> None:
    states("tpu-vm").touch()
    states("tpu-vm").write_text(states("tpu-vm").read_text() or "READY")
    count = CLOUD / "workers.txt"
    for worker in range(int(count.read_text()) if count.exists() else 1):
        (SLICE / str(worker)).mkdir(parents=True)


def power_off(machines: Path) -> None:
    """Every process of the machines ends, and their disks are gone."""
    for process in machines.glob("*/tmux.pid"):
        try:
            os.killpg(int(process.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass
    shutil.rmtree(machines, ignore_errors=True)


def delete(group: str, words: list[str], flags: dict[str, str]) -> int:
    assert group == "tpu-vm" or "force" in flags
    if (CLOUD / "stays").exists():
        return 0
    states(group).unlink()
    if group == "queued-resources":
        states("tpu-vm").unlink(missing_ok=True)
    power_off(SLICE)
    return 0


def workers(flags: dict[str, str]) -> list[Path]:
    assert states("tpu-vm").read_text() == "READY", "the slice is not ready"
    if flags["worker"] == "all":
        return sorted(SLICE.iterdir())
    return [SLICE / flags["worker"]]


def scp(group: str, words: list[str], flags: dict[str, str]) -> int:
    source, destination = words
    for home in workers(flags):
        shutil.copy(source, home / destination.partition(":")[2])
    return 0


def ssh(group: str, words: list[str], flags: dict[str, str]) -> int:
    assert not sys.stdin.read()
    preempt = CLOUD / "preempt"
    if " follow" in flags["command"] and preempt.exists():
        states("tpu-vm").write_text("PREEMPTED")
        if states("queued-resources").exists():
            states("queued-resources").write_text("SUSPENDED")
            states("tpu-vm").unlink()
        preempt.unlink()
        power_off(SLICE)
        return 255
    environment = {"PATH": f"{CLOUD / 'worker_bin'}:/usr/bin:/bin"}
    code = 0
    for home in workers(flags):
        # A shell gets the command as ssh gives it: one line of text.
        process = subprocess.run(
            ["bash", "-c", flags["command"]],
            cwd=home,
            env=environment | {"HOME": str(home)},
        )
        code = code or process.returncode
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
