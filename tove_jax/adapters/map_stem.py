"""Convolutional stems: an expert's dense map (depth, normals, edges) becomes tokens on the student's grid."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.adapters.initializers import torch_linear
from tove_jax.errors import InputError

STRIDE = 16

LOGICAL_AXES = (
    (r"(.*/)?stem/(conv[0-3]|out)/kernel", (None, None, None, "embed")),
    (r"(.*/)?stem/norm[0-3]/(scale|bias)", ("embed",)),
    (r"(.*/)?stem/out/bias", ("embed",)),
)


def resize_grid(patches: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Resizes (B, H, W, D) bilinearly to (B, *grid, D).

    Half-pixel centres and no antialias filter, as torch's ``interpolate(mode="bilinear",
    align_corners=False)``; the same values when the grid is the same.
    """
    if patches.shape[1:3] == tuple(grid):
        return patches
    shape = (patches.shape[0], *grid, patches.shape[3])
    return jax.image.resize(patches, shape, "bilinear", antialias=False)


def unit_range(maps: jax.Array) -> jax.Array:
    """Scales each picture's map to [-1, 1] by its least and greatest value, all channels together.

    One range for all channels keeps the direction of normals; a map of one value becomes zero.

    Args:
      maps: (B, H, W, C).
    """
    low, high = (reduce(maps, axis=(1, 2, 3), keepdims=True) for reduce in (jnp.min, jnp.max))
    spread = high - low
    return jnp.where(spread > 0, 2 * (maps - low) / jnp.where(spread > 0, spread, 1) - 1, 0)


class MapStem(nn.Module):
    """Four 3x3 convolutions of stride 2 with group norm and ReLU, then one of 1x1 (ToVE; sizes ours).

    The map is brought to [-1, 1], resized bilinearly to 16 times the grid, and halved four times. The
    convolutions pad by one pixel on each side; only the last has a bias, since a norm follows the others.

    Attributes:
      grid: (rows, columns) of the student's patches.
      width: w; the convolutions have w/8, w/4, w/2, w channels, the tokens w.
      groups: of the group norms; divides w/8.
      dtype: compute dtype; None promotes.
    """

    grid: tuple[int, int]
    width: int
    groups: int = 8
    dtype: Any = None

    @nn.compact
    def __call__(self, maps: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) of 1 to 3 channels to (B, *grid, width).

        Raises:
          InputError: more than three channels, or widths that do not divide.
        """
        if not 1 <= maps.shape[-1] <= 3:
            raise InputError(f"map stem: expected a map of 1 to 3 channels, found {maps.shape[-1]}")
        if self.width % 8 or (self.width // 8) % self.groups:
            raise InputError(f"config.method.stem_width: expected a multiple of 8 x {self.groups}, found {self.width}")
        x = resize_grid(unit_range(maps), (STRIDE * self.grid[0], STRIDE * self.grid[1]))
        for index in range(4):
            width = self.width >> (3 - index)
            init = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
            conv = nn.Conv(
                width, (3, 3), (2, 2), ((1, 1), (1, 1)), use_bias=False, dtype=self.dtype, kernel_init=init,
                name=f"conv{index}",
            )  # fmt: skip
            norm = nn.GroupNorm(
                self.groups, epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=f"norm{index}"
            )
            x = nn.relu(norm(conv(x)))
        init = torch_linear(x.shape[-1])
        return nn.Conv(self.width, (1, 1), dtype=self.dtype, kernel_init=init, bias_init=init, name="out")(x)
