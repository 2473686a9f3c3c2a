"""Small picture files for the tests of sources and loader."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image


def picture_bytes(number: int = 0, kind: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    """Returns a file of noise that `number` seeds."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def make_picture():
    """Gives `picture_bytes`."""
    return picture_bytes
