"""Feature errors against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from tove_jax.eval.feature_error import TokenError, linear_error


def test_token_error_in_batches_is_one_minus_r_squared():
    generator = np.random.default_rng(0)
    target = generator.normal(size=(23, 5, 3)) + 50
    student = target + generator.normal(size=target.shape) * 0.3
    error = TokenError()
    for start in range(0, 23, 4):
        error.add(student[start : start + 4], target[start : start + 4])
    expected = ((student - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
    assert error.pictures == 23
    np.testing.assert_allclose(error.relative(), expected, rtol=1e-9)


def test_the_mean_target_scores_one_and_a_collapsed_target_is_not_good():
    target = np.random.default_rng(1).normal(size=(8, 4, 3))
    error = TokenError()
    error.add(np.broadcast_to(target.mean(0), target.shape), target)
    assert error.relative() == pytest.approx(1.0)
    collapsed = TokenError()
    collapsed.add(np.zeros((4, 2, 2)), np.zeros((4, 2, 2)))
    assert np.isnan(collapsed.relative())
    assert np.isnan(TokenError().relative())


def test_linear_error_tells_a_linear_map_from_noise():
    generator = np.random.default_rng(2)
    train, held_out = generator.normal(size=(300, 6)), generator.normal(size=(100, 6))
    mixing = generator.normal(size=(6, 9))
    assert linear_error(train, train @ mixing + 3, held_out, held_out @ mixing + 3, l2=1e-9) < 1e-6
    noise = generator.normal(size=(300, 9)), generator.normal(size=(100, 9))
    assert 0.9 < linear_error(train, noise[0], held_out, noise[1]) < 1.2
