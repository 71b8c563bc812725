"""open_clip without torchvision, which it imports for image transforms that no test here uses.

Importing this module skips the importing test module where open_clip is not installed.
"""

import sys
from unittest import mock

import pytest

# Whatever looks for a real torchvision has to be imported before the stand-in is there.
from tests.torch_pipeline import torch  # noqa: F401

_TORCHVISION = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional")

with mock.patch.dict(
    sys.modules, {f"torchvision{name}": mock.MagicMock(__spec__=None) for name in _TORCHVISION}
):
    open_clip = pytest.importorskip("open_clip")
