"""k-nearest-neighbour accuracy by cosine similarity."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.errors import InputError

_BLOCK = 256


def _unit_rows(features: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.where(norm == 0, 1, norm)


@functools.partial(jax.jit, static_argnames="count")
def _nearest_block(gallery: jax.Array, queries: jax.Array, count: int) -> jax.Array:
    # Full precision: the default on accelerators rounds to bfloat16, which reorders neighbours.
    similarity = jnp.matmul(_unit_rows(queries), _unit_rows(gallery).T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(similarity, count)[1]


def nearest(gallery: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Finds the most similar gallery rows of each query, nearest first.

    Args:
      gallery: (G, D) features.
      queries: (Q, D) features.
      count: neighbours per query, at most G.

    Returns:
      int32 (Q, count) row numbers in the gallery. Equal similarities go to the lower row number. A
      row of zeros has similarity 0 to everything.

    Raises:
      InputError: shapes do not fit, or `count` is not in 1..G.
    """
    if gallery.ndim != 2 or queries.ndim != 2 or gallery.shape[1] != queries.shape[1]:
        raise InputError(
            f"nearest neighbours: expected gallery (G, D) and queries (Q, D), found {gallery.shape} and {queries.shape}"
        )
    if not 1 <= count <= len(gallery):
        raise InputError(f"eval.neighbours: expected 1 to {len(gallery)} (the pictures in the gallery), found {count}")
    known = jnp.asarray(gallery, jnp.float32)
    found = []
    for start in range(0, len(queries), _BLOCK):
        block = np.asarray(queries[start : start + _BLOCK], np.float32)
        # One static shape for every block: a short last one is padded and cut.
        padded = np.pad(block, ((0, _BLOCK - len(block)), (0, 0)))
        found.append(np.asarray(_nearest_block(known, padded, count))[: len(block)])
    return np.concatenate(found) if found else np.zeros((0, count), np.int32)


def vote(neighbour_labels: np.ndarray, classes: int) -> np.ndarray:
    """Takes the most frequent label of each row; equal counts go to the lower label.

    Args:
      neighbour_labels: int (Q, k), each in 0..classes-1.
      classes: number of labels.

    Returns:
      int64 (Q,).
    """
    rows = np.repeat(np.arange(len(neighbour_labels)), neighbour_labels.shape[1])
    counts = np.zeros((len(neighbour_labels), classes), np.int64)
    np.add.at(counts, (rows, neighbour_labels.reshape(-1)), 1)
    return counts.argmax(axis=1)


def classify(gallery: np.ndarray, labels: np.ndarray, queries: np.ndarray, neighbours: int) -> np.ndarray:
    """Labels each query by a vote of its nearest gallery rows, each with one voice.

    The same answers as scikit-learn's ``KNeighborsClassifier(metric="cosine")``.

    Args:
      gallery: (G, D) features of the labelled pictures.
      labels: int (G,), each from 0.
      queries: (Q, D) features.
      neighbours: voters k.

    Returns:
      int64 (Q,) labels.
    """
    return vote(labels[nearest(gallery, queries, neighbours)], int(labels.max()) + 1)
