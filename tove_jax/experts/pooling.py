"""Area means over a grid of tokens: a larger grid brought to a smaller one."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def pooled_side(side: int, wanted: int) -> int:
    """Returns the cells of an axis after pooling: an axis that is no longer than `wanted` stays as it is."""
    return min(side, wanted)


@functools.cache
def _means(side: int, wanted: int) -> np.ndarray:
    """Returns the (wanted, side) matrix of adaptive means: cell i takes [floor(i s / w), ceil((i + 1) s / w))."""
    matrix = np.zeros((wanted, side), np.float32)
    for cell in range(wanted):
        start, stop = cell * side // wanted, -(-(cell + 1) * side // wanted)
        matrix[cell, start:stop] = 1.0 / (stop - start)
    return matrix


def pool(patches: Any, height: int, width: int) -> Any:
    """Brings tokens (..., H, W, D) to a grid of at most height x width cells by area means.

    Where H is a multiple of the height the cells are disjoint blocks, otherwise neighbours overlap by one row
    (the windows of adaptive average pooling). NumPy or JAX arrays, also traced; computes in float32.
    """
    high, wide = pooled_side(patches.shape[-3], height), pooled_side(patches.shape[-2], width)
    if (high, wide) == tuple(patches.shape[-3:-1]):
        return patches
    space = patches.__array_namespace__()
    values = patches.astype(np.float32)
    if patches.shape[-3] % high == 0 and patches.shape[-2] % wide == 0:
        blocks = (high, patches.shape[-3] // high, wide, patches.shape[-2] // wide)
        return values.reshape(*values.shape[:-3], *blocks, values.shape[-1]).mean(axis=(-4, -2))
    rows, columns = _means(patches.shape[-3], high), _means(patches.shape[-2], wide)
    precise = {} if isinstance(values, np.ndarray) else {"precision": "highest"}
    values = space.einsum("ih,...hwd->...iwd", rows, values, **precise)
    return space.einsum("jw,...iwd->...ijd", columns, values, **precise)


def unpool(patches: Any, height: int, width: int) -> Any:
    """Brings pooled tokens (..., h, w, D) back to a height x width grid, each cell repeated; the nearest one."""
    rows = np.arange(height) * patches.shape[-3] // height
    columns = np.arange(width) * patches.shape[-2] // width
    return patches[..., rows, :, :][..., columns, :]
