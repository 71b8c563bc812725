"""The table of all readers."""

from tests.fuzz import model_readers, run_readers, text_readers  # noqa: F401
from tests.fuzz.reader import READERS

__all__ = ["READERS"]
