"""The expert's call: one compilation, batches that fit, memory that is short."""

from __future__ import annotations

import numpy as np
import pytest

from tests.experts.test_extract import CARD, COUNT, HOST, OPTIONS, Toys
from tove_jax.errors import InputError
from tove_jax.experts import runner as module
from tove_jax.experts.base import Expert
from tove_jax.experts.extract import extract
from tove_jax.experts.runner import Runner
from tove_jax.experts.store import FeatureStore


class _Small:
    """An expert with memory for `fits` pictures."""

    def __init__(self, fits, kind=MemoryError):
        self.fits, self.kind, self.asked = fits, kind, []

    def __call__(self, params, pixels):
        self.asked.append(len(pixels))
        if len(pixels) > self.fits:
            raise self.kind("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return HOST.apply(params, pixels)


@pytest.mark.parametrize("codec", ["bf16", "pca:3+int8"])
@pytest.mark.parametrize("kind", [MemoryError, RuntimeError])
def test_halves_the_batch_when_memory_is_short(tmp_path, codec, kind):
    small = _Small(3, kind)
    options = {**OPTIONS, "batch": 16}
    manifest = extract(
        Expert(CARD, {}, "h" * 64, small), Toys(), range(COUNT), tmp_path / "toy", codec=codec, **options
    )
    assert manifest.complete
    assert [size for size in small.asked if size > 3] == [16, 8, 4] and set(small.asked[3:]) == {2}
    extract(HOST, Toys(), range(COUNT), tmp_path / "wanted", codec=codec, **{**options, "batch": 2})
    found, wanted = (FeatureStore.open(tmp_path / name) for name in ("toy", "wanted"))
    assert found.ids == wanted.ids
    for id in found.ids:
        assert found.read(id)["patches"].tobytes() == wanted.read(id)["patches"].tobytes()
    assert found.manifest.statistics == wanted.manifest.statistics


def test_memory_for_no_picture(tmp_path):
    with pytest.raises(InputError, match="no memory for a single picture: RESOURCE_EXHAUSTED"):
        extract(Expert(CARD, {}, "h" * 64, _Small(0)), Toys(), range(COUNT), tmp_path / "toy", **OPTIONS)
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["manifest.json"]


def test_another_fault_is_not_taken_for_it(tmp_path):
    def broken(params, pixels):
        raise RuntimeError("INVALID_ARGUMENT")

    with pytest.raises(RuntimeError, match="INVALID_ARGUMENT"):
        extract(Expert(CARD, {}, "h" * 64, broken), Toys(), range(COUNT), tmp_path / "toy", **OPTIONS)


@pytest.mark.parametrize(("free", "picture", "fits"), [(0, 1, 1), (1000, 10, 64), (1e12, 1e9, 256), (100, 0, 64)])
def test_what_fits(free, picture, fits):
    assert module.fitting(free, picture) == fits


def test_one_compilation_for_two_stores(tmp_path):
    import dataclasses

    calls = []

    def apply(params, pixels):
        calls.append(pixels.shape)
        return HOST.apply(params, pixels)

    runner = Runner(Expert(dataclasses.replace(CARD, backend="jax"), {}, "h" * 64, apply))
    assert runner.batch == module.BATCH, "CPUs tell no limit of memory"
    for name, view in (("toy", CARD.view), ("toy@flip", CARD.view.flipped())):
        extract(runner.expert, Toys(), range(20), tmp_path / name, runner=runner, view=view, progress=False)
    assert calls == [(16, 8, 8, 3)]


def test_fits_the_batch_to_a_devices_memory(monkeypatch):
    import dataclasses

    import jax

    class _Device:
        def memory_stats(self):
            return {"bytes_limit": 100_000, "bytes_in_use": 10_000}

    def apply(params, pixels):
        return HOST.apply(params, pixels)

    monkeypatch.setattr(jax, "local_devices", lambda: [_Device()] * 2)
    runner = Runner(Expert(dataclasses.replace(CARD, backend="jax"), {}, "h" * 64, apply))
    assert runner.batch > 2 and runner.batch % 2 == 0 and runner.batch <= 2 * 0.7 * 90_000 / (2 * 960)
    with pytest.raises(InputError, match="batch"):
        Runner(HOST, -1)
    np.testing.assert_equal(Runner(HOST).batch, module.BATCH)
