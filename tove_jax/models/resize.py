"""Bilinear resizing with aligned corners, as dense prediction heads use it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def corner_matrix(source: int, target: int) -> np.ndarray:
    """Weights of one-dimensional linear interpolation that maps the first sample to the first, the last to the last.

    Equal to torch's ``interpolate(mode="linear", align_corners=True)``.

    Args:
      source: samples given.
      target: samples wanted.

    Returns:
      float64 (target, source); rows sum to 1.
    """
    places = np.linspace(0.0, source - 1.0, target) if target > 1 else np.zeros(1)
    lower = np.minimum(np.floor(places).astype(int), source - 1)
    share = places - lower
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target), lower), 1.0 - share)
    np.add.at(matrix, (np.arange(target), np.minimum(lower + 1, source - 1)), share)
    return matrix


def resize_corners(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Resizes maps bilinearly, corner pixels on corner pixels.

    Equal to torch's ``interpolate(mode="bilinear", align_corners=True)``; the same values when the
    shape is the same.

    Args:
      x: (B, H, W, C).
      shape: (height, width) wanted.

    Returns:
      (B, *shape, C) in the dtype of `x`.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    for axis, (source, target) in enumerate(zip(x.shape[1:3], shape, strict=True), start=1):
        if source != target:
            weights = jnp.asarray(corner_matrix(source, target), x.dtype)
            subscripts = "th,bhwc->btwc" if axis == 1 else "tw,bhwc->bhtc"
            x = jnp.einsum(subscripts, weights, x, precision=precision)
    return x
