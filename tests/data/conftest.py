"""Small picture files for the tests of sources and loader."""

from __future__ import annotations

import io
import pickle
from concurrent.futures import ThreadPoolExecutor

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


def check_promises(source):
    """What every source promises."""
    assert len(source) == len(source.ids) == len(source.labels) == len(source.captions)
    assert len(set(source.ids)) == len(source)
    assert source.name and source.licence
    copy = pickle.loads(pickle.dumps(source))
    assert list(copy.ids) == list(source.ids)
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(source.__getitem__, range(len(source))))
    for index, picture in enumerate(pictures):
        assert (picture.id, picture.label, picture.caption) == (
            source.ids[index],
            source.labels[index],
            source.captions[index],
        )
        assert picture.image.dtype == np.uint8 and picture.image.ndim == 3 and picture.image.shape[2] == 3
        np.testing.assert_array_equal(copy[index].image, picture.image)


@pytest.fixture(name="check_source")
def check_source_fixture():
    """Gives `check_promises`."""
    return check_promises
