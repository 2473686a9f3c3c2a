"""HAWAII's way from a teacher's grid to the student's tokens: space to depth, then a two-layer MLP."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax

from tove_jax.adapters.initializers import torch_linear

LOGICAL_AXES = (
    (r"(.*/)?hidden/kernel", ("embed", "mlp")),
    (r"(.*/)?hidden/bias", ("mlp",)),
    (r"(.*/)?out/kernel", ("mlp", "embed")),
    (r"(.*/)?out/bias", ("embed",)),
)

Unshuffle = Literal["space_to_depth", "resize"]


class MlpHead(nn.Module):
    """Linear, exact GELU, Linear, drawn as ``torch.nn.Linear``: ``{hidden,out}/{kernel,bias}``.

    Attributes:
      width: output width.
      hidden: hidden width.
      dtype: compute dtype; None promotes.
    """

    width: int
    hidden: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., C) to (..., width)."""

        def linear(name: str, z: jax.Array, features: int) -> jax.Array:
            init = torch_linear(z.shape[-1])
            return nn.Dense(features, dtype=self.dtype, kernel_init=init, bias_init=init, name=name)(z)

        return linear("out", nn.gelu(linear("hidden", x, self.hidden), approximate=False), self.width)


def unshuffle_factor(height: int, width: int, grid: int, kind: Unshuffle) -> int:
    """Returns k: how many of a teacher's cells a side go into one of the student's."""
    return max(1, min(height, width) // grid) if kind == "space_to_depth" else 1


def unshuffle(patches: jax.Array, grid: int, kind: Unshuffle = "space_to_depth") -> jax.Array:
    """Brings a teacher's grid to the student's number of tokens.

    The grid is resized bilinearly (half-pixel centres, no antialias) to k g x k g with
    k = max(1, min(H, W) // g), then every k x k cells become one token of k k C channels, row by row.
    ``resize`` has k = 1.

    Args:
      patches: (B, H, W, C).
      grid: g, the student's tokens a side.
      kind: see above.

    Returns:
      (B, g * g, k * k * C).
    """
    batch, height, width, channels = patches.shape
    k = unshuffle_factor(height, width, grid, kind)
    if (height, width) != (k * grid, k * grid):
        patches = jax.image.resize(patches, (batch, k * grid, k * grid, channels), "bilinear", antialias=False)
    cells = patches.reshape(batch, grid, k, grid, k, channels).swapaxes(2, 3)
    return cells.reshape(batch, grid * grid, k * k * channels)
