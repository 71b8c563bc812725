"""One process at a time writes in a folder.

On a disk the operating system keeps the lock, also between hosts that share it by NFS, and gives it
up when the process ends, however it does. A bucket has no locks: there an object that only one can
create stands for it, and who holds it writes it again and again, as a sign of life.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import fsspec
from etils import epath
from fsspec.implementations.local import LocalFileSystem

from alignprop_jax.devices.distributed import from_main, is_main
from alignprop_jax.errors import UserError
from alignprop_jax.loading.buckets import in_bucket
from alignprop_jax.process import signals

_NAME = ".lock"
_SECONDS_BETWEEN_SIGNS = 15.0
# Who gives no sign for so long is dead. The sign may be late where a network is slow.
_SECONDS_OF_A_DEAD = 60.0
# Of several that take over the object of a dead one, the last to write has it.
_SECONDS_TO_SETTLE = 3.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

Record = dict[str, Any]


class Lock(Protocol):
    """What `locked` takes."""

    def take(self) -> Record | None:
        """Takes the lock; returns the record of who has it, if another does."""

    def release(self) -> None:
        """Lets it go, where it is held."""


@contextlib.contextmanager
def locked(folder: epath.PathLike) -> Iterator[None]:
    """Keeps other processes out of a folder that exists; a run of several hosts is as one.

    Raises:
        UserError: another one is in, which it names; or the folder cannot be locked.
    """
    lock, problem = None, None
    if is_main():
        try:
            lock = open_lock(folder)
            signals.at_end(lock.release)
            holder = lock.take()
            if holder is not None:
                problem = (
                    f"is in use by {_describe(holder)}; wait for it or end it, "
                    "or give another --workdir"
                )
        except Exception as error:  # A bucket's errors are those of its library.
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            problem = f"cannot be locked ({reason}); give another --workdir"
    problem = from_main(problem)
    if problem:
        raise UserError(f"workdir {os.fspath(folder)!r} {problem}")
    try:
        yield
    finally:
        if lock:
            lock.release()


def open_lock(folder: epath.PathLike) -> Lock:
    """Returns the lock of a folder, which is not taken yet."""
    if in_bucket(os.fspath(folder)):
        return ObjectLock(f"{os.fspath(folder)}/{_NAME}")
    return FileLock(Path(folder) / _NAME)


class FileLock:
    """A lock of the operating system on a file, which says who has it."""

    def __init__(self, path: Path):
        self._path = path
        self._file: int | None = None
        self._instead: ObjectLock | None = None

    def take(self) -> Record | None:
        while True:
            # From here on a signal has it released.
            self._file = file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                # Not flock, which processes that are forked off would hold on to.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file = None
                os.close(file)
                if error.errno in _NO_LOCKS:
                    self._path.unlink(missing_ok=True)
                    self._instead = ObjectLock(self._path.with_name(f"{_NAME}.object"))
                    return self._instead.take()
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                return self._holder()
            if _is_at(file, self._path):
                break
            self._file = None
            os.close(file)  # Its holder has removed it meanwhile.
        os.ftruncate(file, 0)
        os.write(file, json.dumps(_own_record()).encode())
        return None

    def release(self) -> None:
        if self._instead:
            self._instead.release()
        file, self._file = self._file, None
        if file is None:
            return
        # Where it is another's after all, because a signal came before that was known, this fails.
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, self._path):
                # Before it is open to others.
                self._path.unlink(missing_ok=True)
        os.close(file)

    def _holder(self) -> Record:
        # Who takes it writes a moment later.
        for _ in range(20):
            with contextlib.suppress(OSError, ValueError):
                return dict(json.loads(self._path.read_text("utf-8")))
            time.sleep(0.05)
        return {}


class ObjectLock:
    """An object in a bucket, which only one can create; or a file where there are no locks."""

    def __init__(self, path: str | Path):
        self._files, self._path = fsspec.url_to_fs(str(path))
        self._record: Record = {}
        self._at_work = threading.RLock()
        self._released = threading.Event()

    def take(self) -> Record | None:
        self._record = _own_record()
        holder = self._create()
        if holder is not None:
            self._record = {}
            return holder
        threading.Thread(target=self._give_signs, name="lock", daemon=True).start()
        return None

    def release(self) -> None:
        with self._at_work:
            self._released.set()
            # Somebody may have removed it by hand.
            with contextlib.suppress(FileNotFoundError):
                if self._record and self._is_ours(self._read()):
                    self._files.rm_file(self._path)
            self._record = {}

    def _create(self) -> Record | None:
        while True:
            with contextlib.suppress(FileNotFoundError):  # It was released meanwhile: again.
                try:
                    self._write_first()
                    return None
                except FileExistsError:
                    holder = self._wait_for_a_sign()
                if holder is not None:
                    return holder
                self._write()
                time.sleep(_SECONDS_TO_SETTLE)
                holder = self._read()
                return None if self._is_ours(holder) else holder

    def _wait_for_a_sign(self) -> Record | None:
        """Returns the record of who has it, None when that process has ended."""
        first = self._read()
        if first.get("machine") == _machine() is not None:
            # Another process may have got its number since.
            return first if _started(first.get("process")) == first.get("started") else None
        print(f"waiting for a sign of life of {_describe(first)}", flush=True)
        end = time.monotonic() + _SECONDS_OF_A_DEAD
        while time.monotonic() < end:
            time.sleep(_SECONDS_BETWEEN_SIGNS / 5)
            if (now := self._read()) != first:
                return now
        return None

    def _give_signs(self) -> None:
        while not self._released.wait(_SECONDS_BETWEEN_SIGNS):
            # When it does not get through, the next one may.
            with self._at_work, contextlib.suppress(Exception):
                if self._released.is_set():
                    return
                holder = self._read()
                if not self._is_ours(holder):
                    signals.end(
                        f"error: {_describe(holder)} took over {self._path} when this one gave no "
                        f"sign of life for {_SECONDS_OF_A_DEAD:.0f} s",
                        1,
                    )
                self._record["signs"] += 1
                self._write()

    def _is_ours(self, record: Record) -> bool:
        return {**record, "signs": 0} == {**self._record, "signs": 0}

    def _read(self) -> Record:
        try:
            return dict(json.loads(self._files.cat_file(self._path)))
        except ValueError:
            return {}

    def _write_first(self) -> None:
        """Writes where nothing is; raises FileExistsError where another was first."""
        if isinstance(self._files, LocalFileSystem):
            # fsspec's own way looks first and writes then, so that two may find nothing there.
            with open(self._path, "xb") as file:
                file.write(_encode(self._record))
        else:
            self._files.pipe_file(self._path, _encode(self._record), mode="create")

    def _write(self) -> None:
        self._files.pipe_file(self._path, _encode(self._record))


def _own_record() -> Record:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": _machine(),
        "started": _started(os.getpid()),
        "signs": 0,
    }


def _describe(record: Record) -> str:
    if not record:
        return "another process"
    return (
        f"process {record.get('process')} on host {record.get('host')} since {record.get('since')}"
    )


def _machine() -> str | None:
    """What the processes that this one can see have in common; None where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(process: int) -> int | None:
    """When a process started, in ticks since this machine did; None when it has ended."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    # The name of the program, in parentheses, may hold anything.
    state, *numbers = status.rpartition(")")[2].split()
    return None if state == "Z" else int(numbers[18])


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _encode(record: Record) -> bytes:
    return json.dumps(record).encode()
