"""What a reader under test is, and the table of them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.oracle import Failure, judge
from tests.fuzz.strategies import Case


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of foreign input, with what is fed to it and what is asked of it.

    Attributes:
        draw: an input, mostly a valid one that was damaged.
        read: the call under test.
        check: given the input and the result, raises AssertionError where it is not right.
        culprits: given the input, words of which an error has to hold one.
        valid: an input that has a result: where it has none, the others say nothing.
    """

    draw: Callable[[Random], Case]
    read: Callable[[Any], Any]
    valid: Any
    check: Callable[[Any, Any], None] = lambda value, result: None
    culprits: Callable[[Any], Sequence[str]] = lambda value: ()

    def judge(self, value: Any) -> str:
        """Returns "result" or "error"; `Failure` for anything else."""
        return judge(
            lambda: self.read(value),
            lambda result: self.check(value, result),
            self.culprits(value),
        )


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
        open: makes the reader, with its valid files in a folder.
        share: of the inputs of a campaign; one that is slow has a small one.
    """

    open: Callable[[Path], Reader]
    share: float


READERS: dict[str, Entry] = {}
"""Every reader of foreign input by name."""


def reader(share: float = 1.0) -> Callable[[Callable[[Path], Reader]], Callable[[Path], Reader]]:
    """Adds a function that makes a reader to the table, under the function's name."""

    def add(function: Callable[[Path], Reader]) -> Callable[[Path], Reader]:
        READERS[function.__name__] = Entry(function, share)
        return function

    return add


class Files:
    """A folder of valid files, some of which an input replaces for a while."""

    def __init__(self, folder: Path, contents: Mapping[str, bytes]):
        self.folder = folder
        self.contents = dict(contents)
        for name, content in contents.items():
            _put(folder / name, content)

    @contextlib.contextmanager
    def changed(self, changes: Mapping[str, bytes | None]) -> Iterator[Path]:
        """The folder with some files changed; None takes one away."""
        for name, content in changes.items():
            _put(self.folder / name, content)
        try:
            yield self.folder
        finally:
            for name in changes:
                _put(self.folder / name, self.contents.get(name))

    def reader(
        self,
        draw: Callable[[Random], Case],
        read: Callable[[Path], Any],
        check: Callable[[Mapping[str, bytes | None], Any], None] = lambda value, result: None,
        culprits: Sequence[str] | None = None,
    ) -> Reader:
        """A reader of the folder; its errors name the file that was changed, or the folder."""

        def read_changed(value: Mapping[str, bytes | None]) -> Any:
            with self.changed(value):
                return read(self.folder)

        def check_changed(value: Mapping[str, bytes | None], result: Any) -> None:
            check({**self.contents, **value}, result)

        named = (str(self.folder),) if culprits is None else culprits
        return Reader(draw, read_changed, {}, check_changed, lambda value: named)


def _put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def same(given: Any, expected: Any, what: str) -> None:
    """AssertionError where two values differ; NaN equals NaN."""
    if not (given == expected or (given != given and expected != expected)):
        raise AssertionError(f"{what} is {given!r}, not {expected!r}")


__all__ = ["READERS", "Entry", "Failure", "Files", "Reader", "reader", "same"]
