"""The media's benchmark: it writes real stores, reads all of them, and leaves nothing."""

from __future__ import annotations

import numpy as np

from tove_jax.bench import input as bench
from tove_jax.experts.media import SUFFIXES
from tove_jax.experts.store import FeatureStore, verify_store


def test_stores_of_the_benchmark_are_sound(tmp_path):
    for medium in SUFFIXES:
        manifest = bench.write_store(tmp_path / medium, medium, 10, 3, 8, shard_records=4)
        assert manifest.medium == medium and verify_store(tmp_path / medium) == (10, [])
    first, second = (FeatureStore.open(tmp_path / medium) for medium in SUFFIXES)
    for id in first.ids:
        np.testing.assert_array_equal(
            first.read(id)["patches"].view(np.uint16), second.read(id)["patches"].view(np.uint16)
        )
    assert bench.read_speed(first, batch=5, threads=2, seed=0) > 0


def test_every_medium_is_measured(tmp_path, capsys):
    speeds = bench.measure(tmp_path, records=16, grid=2, width=8, batch=4, passes=1, shard_records=5)
    assert [(speed.medium, speed.verify) for speed in speeds] == [(m, v) for v in (True, False) for m in SUFFIXES]
    assert all(speed.warm > 0 and speed.first > 0 for speed in speeds)
    assert list(tmp_path.iterdir()) == []
    assert bench.table(speeds).count("\n") == 5
    bench.main(["--records=16", "--batch=4", "--passes=1", f"--folder={tmp_path}"])
    assert "| mmap | compared |" in capsys.readouterr().out
