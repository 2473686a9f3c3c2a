"""Decomposed relative positions: a score a row distance and a column distance, drawn from the query."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.errors import InputError


def linear_matrix(source: int, target: int) -> np.ndarray:
    """Weights of one-dimensional linear interpolation as torch computes it.

    Half-pixel centres (``align_corners=False``), borders repeated, no antialias filter.

    Args:
      source: samples given.
      target: samples wanted.

    Returns:
      float64 (target, source); rows sum to 1.
    """
    centres = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0.0)
    lower = np.minimum(np.floor(centres).astype(int), source - 1)
    share = np.minimum(centres - lower, 1.0)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target), lower), 1.0 - share)
    np.add.at(matrix, (np.arange(target), np.minimum(lower + 1, source - 1)), share)
    return matrix


def relative_rows(table: jax.Array, size: int) -> jax.Array:
    """Looks up the embedding of every distance between two places on one axis.

    Args:
      table: (2 s - 1, d), the embeddings of the distances -(s - 1) to s - 1; s other than `size` is
        interpolated linearly, as ViTDet does (Li et al., arXiv:2203.16527).
      size: places on the axis.

    Returns:
      (size, size, d), [q, k] belongs to the distance q - k; the table's dtype.

    Raises:
      InputError: a table that does not have an odd number of rows.
    """
    if table.ndim != 2 or table.shape[0] % 2 == 0:
        raise InputError(f"relative positions: expected (2 s - 1, d), found {table.shape}")
    if table.shape[0] != 2 * size - 1:
        weights = jnp.asarray(linear_matrix(table.shape[0], 2 * size - 1), jnp.promote_types(table.dtype, jnp.float32))
        table = jnp.matmul(weights, table, precision=jax.lax.Precision.HIGHEST).astype(table.dtype)
    places = np.arange(size)
    return table[places[:, None] - places[None, :] + size - 1]


def decomposed_bias(query: jax.Array, rows: jax.Array, columns: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Additive attention scores of decomposed relative positions (MViTv2, arXiv:2112.01526, eq. 4).

    Args:
      query: (B, H * W, heads, d), before the scale of 1/sqrt(d).
      rows: (2 s - 1, d), embeddings of the distances between rows, see `relative_rows`.
      columns: the same of columns.
      grid: (H, W).

    Returns:
      (B, heads, H * W, H * W), float32 at the least: query times embedding, rows plus columns.
    """
    high, wide = grid
    batch, _, heads, width = query.shape
    precise = jnp.promote_types(query.dtype, jnp.float32)
    on_grid = query.reshape(batch, high, wide, heads, width)
    of_rows = relative_rows(rows, high).astype(query.dtype)
    of_columns = relative_rows(columns, wide).astype(query.dtype)
    vertical = jnp.einsum("bhwnd,hkd->bnhwk", on_grid, of_rows, preferred_element_type=precise)
    horizontal = jnp.einsum("bhwnd,wkd->bnhwk", on_grid, of_columns, preferred_element_type=precise)
    scores = vertical[..., :, None] + horizontal[..., None, :]
    return scores.reshape(batch, heads, high * wide, high * wide)


class DecomposedPosition(nn.Module):
    """Relative positions as `tove_jax.models.block.Attention.position` wants them.

    Parameters: ``rows`` (2 R - 1, d) and ``columns`` (2 C - 1, d), zeros when initialised.

    Attributes:
      trained: (R, C), the grid that the tables were made for.
      grid: (H, W), the grid that is looked at.
    """

    trained: tuple[int, int]
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, query: jax.Array) -> jax.Array:
        """Returns (B, heads, H * W, H * W), see `decomposed_bias`."""
        rows, columns = (
            self.param(name, nn.initializers.zeros, (2 * size - 1, query.shape[-1]))
            for name, size in zip(("rows", "columns"), self.trained, strict=True)
        )
        return decomposed_bias(query, rows, columns, self.grid)
