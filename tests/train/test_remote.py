"""Pictures and stores that lie in an object store, here fsspec's in memory."""

import dataclasses
import shutil

import fsspec
import numpy as np
import pytest

from tests.train.conftest import ROOT, overrides
from tove_jax.config import from_file
from tove_jax.data import make_source
from tove_jax.errors import InputError
from tove_jax.experts.run import extract_all, open_stores, store_path
from tove_jax.experts.store import FeatureStore
from tove_jax.files import remote
from tove_jax.files.bucket import Bucket


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


def test_features_that_are_not_there_are_told(elsewhere, tmp_path):
    with pytest.raises(InputError, match="clip: no features of expert 'clip'"):
        other = dataclasses.replace(elsewhere.features, path="memory://bucket/none")
        open_stores(dataclasses.replace(elsewhere, features=other), tmp_path)


def test_shares_are_extracted_into_a_bucket(elsewhere, prepared, tmp_path, monkeypatch):
    """Two machines, of which one is killed between a shard and its index; then it is the store of one machine."""
    features = dataclasses.replace(elsewhere.features, path="memory://bucket/shared", shard_records=8)
    data = [dataclasses.replace(elsewhere.data, flip=False, cache=str(tmp_path / name)) for name in "ab"]
    first, second = (dataclasses.replace(elsewhere, features=features, data=one) for one in data)
    send = Bucket.send

    def dying(self, path, name):
        if name == "shard-00002-of-00003.json":
            raise InputError("killed")
        send(self, path, name)

    monkeypatch.setattr(Bucket, "send", dying)
    with pytest.raises(InputError, match="killed"):
        extract_all(first, tmp_path / "one", experts=["clip"], share=(0, 2), progress=False)
    monkeypatch.setattr(Bucket, "send", send)
    shutil.rmtree(tmp_path / "a")  # nor does the machine come back
    extract_all(second, tmp_path / "two", experts=["clip"], share=(1, 2), progress=False)
    bucket = Bucket("memory://bucket/shared/clip")
    assert "shard-00002-of-00003.json" not in bucket.sizes() and b'"complete": false' in bucket.read("manifest.json")
    remote.local.cache_clear()
    with pytest.raises(InputError, match="clip: extraction is not finished"):
        FeatureStore.open(store_path(second, tmp_path, "clip"))

    extract_all(first, tmp_path / "one", experts=["clip"], share=(0, 2), progress=False)
    copy, copied = remote._copy, []
    monkeypatch.setattr(remote, "_copy", lambda *args: (copied.append(args[2]), copy(*args)))
    found = FeatureStore.open(store_path(first, tmp_path, "clip"))
    # What it extracted itself is not copied back.
    assert set(copied) == {"manifest.json", "shard-00001-of-00003.json", "shard-00001-of-00003.records"}
    wanted = FeatureStore.open(prepared / "features" / "clip")
    assert found.ids == wanted.ids and all(found.crc(id) == wanted.crc(id) for id in wanted.ids)
    np.testing.assert_allclose(found.manifest.statistics.channel_mean, wanted.manifest.statistics.channel_mean)
