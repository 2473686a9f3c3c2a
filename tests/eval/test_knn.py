"""Nearest neighbours against scikit-learn, and their ties."""

from __future__ import annotations

import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.eval import knn


def test_equals_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    generator = np.random.default_rng(0)
    gallery, queries = generator.normal(size=(300, 24)), generator.normal(size=(301, 24))
    labels = generator.integers(0, 5, 300)
    gallery += 0.5 * np.eye(5)[labels] @ generator.normal(size=(5, 24))
    for count in (1, 5, 8):
        reference = neighbors.KNeighborsClassifier(count, metric="cosine").fit(gallery, labels)
        order = reference.kneighbors(queries, return_distance=False)
        np.testing.assert_array_equal(knn.nearest(gallery, queries, count), order)
        np.testing.assert_array_equal(knn.classify(gallery, labels, queries, count), reference.predict(queries))


def test_ties_go_to_the_lower_row_and_the_lower_label():
    gallery = np.array([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(knn.nearest(gallery, np.array([[3.0, 0.0]]), 3), [[1, 2, 0]])
    np.testing.assert_array_equal(knn.vote(np.array([[2, 0, 1], [2, 1, 2], [1, 2, 2]]), 3), [0, 2, 2])


def test_zero_rows_are_far_from_everything_but_finite():
    gallery = np.array([[0.0, 0.0], [1.0, 1.0]])
    np.testing.assert_array_equal(knn.nearest(gallery, np.array([[1.0, 0.5]]), 1), [[1]])


@pytest.mark.parametrize(
    ("gallery", "queries", "count", "words"),
    [
        ((3, 4), (2, 5), 1, r"\(3, 4\) and \(2, 5\)"),
        ((3, 4), (2, 4), 4, "expected 1 to 3"),
        ((3, 4), (2, 4), 0, "eval.neighbours"),
    ],
)
def test_refuses(gallery, queries, count, words):
    with pytest.raises(InputError, match=words):
        knn.nearest(np.ones(gallery), np.ones(queries), count)
