"""Python files of users: configs and rewards."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from alignprop_jax.errors import UserError

_SHOWN_CHARACTERS = 300


def run_python_file(path: str) -> ModuleType:
    """Runs a file and returns it as a module.

    Raises:
        UserError: there is no such file, or it is no Python file. What it raises itself is left to
            `blamed_on`.
    """
    if not Path(path).is_file():
        raise UserError(f"no file {path!r}")
    name = f"alignprop_jax_file:{path}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UserError(f"{path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses, and whatever else asks for the module of a class, find it.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def blamed_on(culprit: str) -> Iterator[None]:
    """Makes whatever code of a user raises, to exit included, a UserError that names it."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except UserError as error:
        raise UserError(f"{culprit}: {error}") from error
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN_CHARACTERS]
        raise UserError(f"{culprit} fails: {reason}") from error
