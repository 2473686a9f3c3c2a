"""Pictures and stores that lie in an object store, here fsspec's in memory."""

import dataclasses

import fsspec
import numpy as np
import pytest

from tests.train.conftest import ROOT, overrides
from tove_jax.config import from_file
from tove_jax.data import make_source
from tove_jax.errors import InputError
from tove_jax.experts.run import extract_all, open_stores
from tove_jax.files import remote


@pytest.fixture
def elsewhere(prepared, tmp_path):
    """Settings whose pictures and features are in a bucket."""
    system = fsspec.filesystem("memory")
    for name in ("pictures", "features"):
        system.put(f"{prepared / name}/", f"/bucket/{name}/", recursive=True)
    remote.local.cache_clear()
    places = [f"--config.data.cache={tmp_path}", "--config.data.path=memory://bucket/pictures"]
    places += [f"--config.student.initialize={prepared / 'start'}", "--config.features.path=memory://bucket/features"]
    yield from_file(str(ROOT / "configs/demo.py:smoke"), overrides(prepared, *places))
    system.rm("/bucket", recursive=True)
    remote.local.cache_clear()


def test_pictures_and_stores_are_read_from_a_bucket(elsewhere, configure, prepared, tmp_path):
    here, there = make_source(configure().data), make_source(elsewhere.data)
    assert list(there.ids) == list(here.ids)
    np.testing.assert_array_equal(there[3].image, here[3].image)
    for flip in (False, True):
        stores = open_stores(elsewhere, tmp_path, flip=flip), open_stores(configure(), prepared, flip=flip)
        for name in stores[0]:
            theirs, ours = (found[name].read(found[name].ids[0]) for found in stores)
            assert found_equal(theirs, ours)


def found_equal(theirs, ours):
    return theirs.keys() == ours.keys() and all(np.array_equal(theirs[key], ours[key]) for key in ours)


def test_a_bucket_is_not_written(elsewhere, tmp_path):
    with pytest.raises(InputError, match="memory://bucket/features can be read but not written"):
        extract_all(elsewhere, tmp_path, progress=False)
    with pytest.raises(InputError, match="clip: no features of expert 'clip'"):
        other = dataclasses.replace(elsewhere.features, path="memory://bucket/none")
        open_stores(dataclasses.replace(elsewhere, features=other), tmp_path)
