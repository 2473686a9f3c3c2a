"""Resizing learned position embeddings to another grid."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.errors import InputError


def bicubic_matrix(source: int, target: int, a: float = -0.75) -> np.ndarray:
    """Weights of one-dimensional bicubic interpolation as torch computes it.

    Half-pixel centres (``align_corners=False``), Keys' kernel with ``a = -0.75`` (jax.image.resize
    takes -0.5, so it does not agree), borders repeated, and no antialias filter when shrinking.

    Args:
      source: samples given.
      target: samples wanted.
      a: the kernel's parameter.

    Returns:
      float64 (target, source); rows sum to 1.
    """
    centres = (np.arange(target) + 0.5) * (source / target) - 0.5
    base = np.floor(centres).astype(int)
    matrix = np.zeros((target, source))
    for offset in range(-1, 3):
        x = np.abs(centres - (base + offset))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        weight = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
        np.add.at(matrix, (np.arange(target), np.clip(base + offset, 0, source - 1)), weight)
    return matrix


def antialiased_bicubic_matrix(source: int, target: int, a: float = -0.5) -> np.ndarray:
    """Weights of one-dimensional bicubic interpolation with torch's ``antialias=True``, which is Pillow's.

    Keys' kernel with ``a = -0.5``, widened by the factor when shrinking; what lies outside is left out and the
    rest weighs more.

    Args:
      source: samples given.
      target: samples wanted.
      a: the kernel's parameter.

    Returns:
      float64 (target, source); rows sum to 1.
    """
    factor = source / target
    wide = max(factor, 1.0)
    centres = factor * (np.arange(target) + 0.5)
    x = np.abs(np.arange(source) + 0.5 - centres[:, None]) / wide
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    matrix = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return matrix / matrix.sum(axis=1, keepdims=True)


def resize_position(embedding: Any, grid: int | tuple[int, int], leading: int = 1) -> np.ndarray:
    """Resizes position embeddings of a square grid, on the host.

    Equal to transformers' ``interpolate_pos_encoding`` (bicubic, ``align_corners=False``). There is
    no antialias filter, in shrinking either, because that is what transformers does with the same
    weights at another size, and an exported encoder must give the same numbers there.

    Args:
      embedding: (leading + n * n, D); the leading rows (CLS) are kept as they are.
      grid: patches a side wanted, or (rows, columns).
      leading: rows that belong to no patch.

    Returns:
      (leading + rows * columns, D), in the embedding's dtype; the same values when the grid is the same.

    Raises:
      InputError: the embedding's rows are not a square grid.
    """
    embedding = np.asarray(embedding)
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    count, width = embedding.shape[0] - leading, embedding.shape[1]
    side = math.isqrt(max(count, 0))
    if count < 1 or side * side != count:
        raise InputError(f"position embedding: expected {leading} + n * n rows, found {embedding.shape[0]}")
    if (rows, columns) == (side, side):
        return embedding
    table = embedding[leading:].astype(np.float64).reshape(side, side, width)
    vertical, horizontal = bicubic_matrix(side, rows), bicubic_matrix(side, columns)
    table = np.einsum("rs,sud->rud", vertical, table)
    table = np.einsum("cu,rud->rcd", horizontal, table).reshape(rows * columns, width)
    return np.concatenate([embedding[:leading], table.astype(embedding.dtype)])


def resize_map(table: jax.Array, grid: tuple[int, int], *, antialias: bool = False) -> jax.Array:
    """Resizes a map of position embeddings inside a traced function, as `resize_position` does on the host.

    Args:
      table: (R, C, D).
      grid: rows and columns wanted.
      antialias: with `antialiased_bicubic_matrix`.

    Returns:
      (rows, columns, D), the table's dtype; the table itself when the grid is the same.
    """
    if table.shape[:2] == tuple(grid):
        return table
    precise = jnp.promote_types(table.dtype, jnp.float32)
    weights = antialiased_bicubic_matrix if antialias else bicubic_matrix
    vertical, horizontal = (
        jnp.asarray(weights(source, target), precise) for source, target in zip(table.shape[:2], grid, strict=True)
    )
    best = jax.lax.Precision.HIGHEST
    resized = jnp.einsum("rs,cu,sud->rcd", vertical, horizontal, table.astype(precise), precision=best)
    return resized.astype(table.dtype)
