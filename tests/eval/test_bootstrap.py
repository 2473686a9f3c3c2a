"""Bootstrap intervals against the central limit theorem, pairs, and runs."""

from __future__ import annotations

import numpy as np

from tove_jax.eval import bootstrap


def test_interval_matches_the_normal_approximation():
    values = (np.arange(400) < 240).astype(float)
    found = bootstrap.bootstrap_mean(values, 2000)
    error = np.sqrt(0.6 * 0.4 / 400)
    assert found.mean == 0.6
    np.testing.assert_allclose(found.std, error, rtol=0.06)
    np.testing.assert_allclose([found.low, found.high], [0.6 - 1.96 * error, 0.6 + 1.96 * error], atol=0.006)
    assert found == bootstrap.bootstrap_mean(values, 2000)
    assert found != bootstrap.bootstrap_mean(values, 2000, seed=1)


def test_pairs_cancel_what_is_shared():
    hard = np.random.default_rng(0).random(500)
    found = bootstrap.paired_difference(hard + 0.25, hard, 50)
    np.testing.assert_allclose(found, [0.25, 0, 0.25, 0.25], atol=1e-12)
    assert bootstrap.bootstrap_mean(hard, 50).std > 0.005


def test_no_resamples_gives_the_mean():
    assert bootstrap.bootstrap_mean(np.array([0, 1]), 0) == (0.5, 0.0, 0.5, 0.5)


def test_over_runs():
    found = bootstrap.over_runs([{"a": 1.0, "b": 2.0}, {"a": 3.0}, {"a": 5.0}])
    assert found == {"count": 3, "a/mean": 3.0, "a/std": 2.0}
    assert bootstrap.over_runs([{"a": 1.0}]) == {"count": 1, "a/mean": 1.0, "a/std": 0.0}
