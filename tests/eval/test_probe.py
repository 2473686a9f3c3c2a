"""The linear probe against scikit-learn, and by its own optimality condition."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special

from tove_jax.errors import InputError
from tove_jax.eval import probe


def _problem(seed: int = 0, count: int = 200, width: int = 12, classes: int = 4):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    centres = generator.normal(size=(classes, width))
    features = centres[labels] + generator.normal(size=(count, width)) * np.geomspace(0.1, 10, width)
    return features + 100, labels


def test_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = _problem()
    fitted = probe.fit(features, labels, 0.02)
    inputs = (features - features.mean(0)) / features.std(0)
    reference = linear_model.LogisticRegression(C=1 / (200 * 0.02), tol=1e-10, max_iter=5000).fit(inputs, labels)
    np.testing.assert_allclose(fitted.weights, reference.coef_.T, atol=1e-4)
    np.testing.assert_array_equal(fitted.predict(features), reference.predict(inputs))


def test_stops_where_the_gradient_is_zero():
    features, labels = _problem(1)
    fitted = probe.fit(features, labels, 0.05)
    inputs = (features - fitted.mean) / fitted.scale
    error = scipy.special.softmax(inputs @ fitted.weights + fitted.bias, axis=1) - np.eye(4)[labels]
    assert np.abs(inputs.T @ error / 200 + 0.05 * fitted.weights).max() < 1e-4
    assert np.abs(error.mean(axis=0)).max() < 1e-4


def test_constant_features_do_no_harm():
    features, labels = _problem(2)
    with_constant = np.concatenate([features, np.full((200, 1), 7.0)], axis=1)
    fitted = probe.fit(with_constant, labels, 0.05)
    assert np.isfinite(fitted.weights).all()
    np.testing.assert_array_equal(fitted.predict(with_constant), probe.fit(features, labels, 0.05).predict(features))


def test_refuses_one_class_and_no_penalty():
    with pytest.raises(InputError, match="at least two classes, found 1"):
        probe.fit(np.ones((3, 2)), np.zeros(3, int), 0.1)
    with pytest.raises(InputError, match="eval.probe_l2"):
        probe.fit(np.ones((3, 2)), np.arange(3), 0.0)
