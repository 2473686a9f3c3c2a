"""Two-dimensional rotary position embeddings, as EVA-02 and DINOv3 define them.

Both turn pairs of channels of every query and key by angles that grow with the patch's row (the first half of the
pairs) and column (the other half); RoFormer, arXiv:2104.09864. They differ in which channels pair up, in the
frequencies and in where the patches lie.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.errors import InputError


class Rotary(NamedTuple):
    """Cosines and sines of every patch, and how channels pair up.

    Attributes:
      cos: float32 (N, head width).
      sin: float32 (N, head width).
      pairs: ``adjacent``: channels 2i and 2i + 1; ``halves``: i and i + head width / 2.
    """

    cos: np.ndarray
    sin: np.ndarray
    pairs: Literal["adjacent", "halves"]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Turns the last N tokens of queries or keys; those before them (CLS, registers) stay as they are.

        Args:
          x: (B, T, heads, head width), T >= N.

        Returns:
          The same shape and dtype; the turn itself is computed in float32 at the least.
        """
        leading = x.shape[1] - self.cos.shape[0]
        patches = x[:, leading:].astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.pairs == "adjacent":
            turned = jnp.stack([-patches[..., 1::2], patches[..., ::2]], axis=-1).reshape(patches.shape)
        else:
            turned = turn_halves(patches)
        patches = (patches * self.cos[:, None] + turned * self.sin[:, None]).astype(x.dtype)
        return jnp.concatenate([x[:, :leading], patches], axis=1) if leading else patches


def turn_halves(x: jax.Array) -> jax.Array:
    """Turns channels (i, i + width / 2) by a right angle: (..., width), the same shape."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def eva02(
    head_width: int, grid: tuple[int, int], reference: int | tuple[int, int] | None = None, theta: float = 10000.0
) -> Rotary:
    """Angles of EVA-02 (Fang et al., arXiv:2303.11331).

    Patch (r, c) lies at (r, c), scaled to the grid that the network was trained at.

    Args:
      head_width: channels a head, a multiple of 4.
      grid: rows and columns of patches.
      reference: rows and columns of that grid; None: this grid, so no scaling.
      theta: the slowest pair turns by about 1 / theta of the fastest.

    Returns:
      The tables; adjacent channels pair up.
    """
    count = _quarter(head_width)
    rows, columns = (reference, reference) if isinstance(reference, int) else (reference or grid)
    frequencies = 1.0 / theta ** (np.arange(count) / count)
    angles = [np.arange(size) * (wanted / size) for size, wanted in zip(grid, (rows, columns), strict=True)]
    vertical, horizontal = (np.repeat(place[:, None] * frequencies, 2, axis=1) for place in angles)
    return _tables(vertical, horizontal, grid, "adjacent")


def dinov3(head_width: int, grid: tuple[int, int], theta: float = 100.0) -> Rotary:
    """Angles of DINOv3 (Siméoni et al., arXiv:2508.10104).

    A patch's centre lies in [-1, 1] on either axis, whatever the grid.

    Args:
      head_width: channels a head, a multiple of 4.
      grid: rows and columns of patches.
      theta: base of the frequencies.

    Returns:
      The tables; channel i pairs up with i + head width / 2.
    """
    count = _quarter(head_width)
    frequencies = 2.0 * np.pi / theta ** (np.arange(count) / count)
    places = [2.0 * (np.arange(size) + 0.5) / size - 1.0 for size in grid]
    vertical, horizontal = (place[:, None] * frequencies for place in places)
    once = _tables(vertical, horizontal, grid, "halves")
    return once._replace(cos=np.tile(once.cos, 2), sin=np.tile(once.sin, 2))


def _quarter(head_width: int) -> int:
    if head_width < 4 or head_width % 4:
        raise InputError(f"rotary embedding: expected a multiple of 4 channels a head, found {head_width}")
    return head_width // 4


def _tables(
    vertical: np.ndarray, horizontal: np.ndarray, grid: tuple[int, int], pairs: Literal["adjacent", "halves"]
) -> Rotary:
    """Puts angles of rows (R, d) and columns (C, d) side by side: (R * C, 2 d)."""
    rows, columns = grid
    angles = np.concatenate([np.repeat(vertical, columns, axis=0), np.tile(horizontal, (rows, 1))], axis=-1)
    return Rotary(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), pairs)
