"""Cutting a map into windows, and putting them together again."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def partition(x: jax.Array, window: int) -> jax.Array:
    """Cuts a map into windows that do not overlap, padded with zeros at the right and bottom where needed.

    Args:
      x: (B, H, W, D).
      window: side of a window.

    Returns:
      (B * ceil(H / window) * ceil(W / window), window, window, D); a picture's windows follow each other, row by row.
    """
    batch, high, wide, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -high % window), (0, -wide % window), (0, 0)))
    down, across = x.shape[1] // window, x.shape[2] // window
    x = x.reshape(batch, down, window, across, window, width).swapaxes(2, 3)
    return x.reshape(batch * down * across, window, window, width)


def unpartition(windows: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Puts the windows of `partition` together again, and cuts the padding off.

    Args:
      windows: (B * number of windows, window, window, D).
      grid: (H, W) of the map.

    Returns:
      (B, H, W, D).
    """
    (high, wide), window = grid, windows.shape[1]
    down, across = -(-high // window), -(-wide // window)
    x = windows.reshape(-1, down, across, window, window, windows.shape[-1]).swapaxes(2, 3)
    return x.reshape(-1, down * window, across * window, windows.shape[-1])[:, :high, :wide]
