"""The table of all readers."""

from tests.fuzz import (  # noqa: F401
    config_readers,
    lora_readers,
    run_readers,
    text_readers,
    weights_readers,
)
from tests.fuzz.reader import READERS

__all__ = ["READERS"]
