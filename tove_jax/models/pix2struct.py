"""Pix2Struct's image encoder: patches of a picture of any shape, its standardisation, and its patch budget.

Lee et al., Pix2Struct: Screenshot Parsing as Pretraining for Visual Language Understanding, ICML 2023,
arXiv:2210.03347.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.errors import InputError
from tove_jax.models import block
from tove_jax.models.attention import Implementation
from tove_jax.models.block import Block, make_norm, stacked_init
from tove_jax.models.stack import parse, run_stack
from tove_jax.parallel import constrain

LOGICAL_AXES = (
    (r"(.*/)?patch_embed/kernel", ("patch", "embed")),
    (r"(.*/)?(row|column)_embed", ("tokens", "embed")),
    (r"(.*/)?norm/scale", ("embed",)),
    *block.LOGICAL_AXES,
)


class Pix2StructEncoder(nn.Module):
    """The encoder, equal to transformers' Pix2StructVisionModel on a picture's own patches.

    There is no padding: a picture of another shape gives another number of patches, and compiles anew.
    Parameters, everything under ``layers/`` stacked on a leading axis of length ``depth``::

        patch_embed/{kernel (p * p * 3, D), bias}   row_embed (P, D)   column_embed (P, D)   norm/scale
        layers/norm{1,2}/scale   layers/attention/{query,key,value,out}/kernel (L, D, D)
        layers/mlp/{gate,fc1}/kernel (L, D, F)      layers/mlp/fc2/kernel (L, F, D)

    Attributes:
      width: D.
      depth: number of layers L.
      heads: attention heads; divides the width.
      mlp_width: F.
      patch_size: side of a patch p, pixels.
      positions: rows of either position table P; the first stands for padding and is not used here.
      norm_epsilon: of every root-mean-square norm.
      dtype: compute dtype; norm statistics and softmax are float32 at the least.
      attention: see `tove_jax.models.attention.choose`.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch_size: int = 16
    positions: int = 4096
    norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32
    attention: Implementation = "auto"

    @nn.compact
    def __call__(
        self, pixels: jax.Array, *, intermediates: Sequence[str] = (), final: bool = True
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Encodes pictures; layers that nothing asked for needs are not run.

        Args:
          pixels: float (B, H, W, 3), standardised (see `standardise`); H and W multiples of the patch size.
          intermediates: names among ``embeddings``, the input of the first layer, and ``layers/{i}``, the
            output of layer i, negative counting from the end; both (B, rows, columns, D).
          final: whether the encoder's output is wanted.

        Returns:
          (B, rows, columns, D), the last layer's output after the last norm (None unless ``final``), and
          a dict with exactly the names asked for.

        Raises:
          InputError: pixels of another shape, more rows or columns than positions, an unknown name, a
            layer out of range.
        """
        side = self.patch_size
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape or any(n % side for n in pixels.shape[1:3]):
            raise InputError(
                f"pixels: expected (batch, height, width, 3) in multiples of {side} pixels, found {pixels.shape}"
            )
        grid = (pixels.shape[1] // side, pixels.shape[2] // side)
        if max(grid) >= self.positions:
            raise InputError(f"pixels: expected fewer than {self.positions} patches a side, found {grid}")
        asked = parse(intermediates, self.depth, ("embeddings",))
        if asked.rows:
            raise InputError(f"intermediates: the encoder has no CLS, found {', '.join(intermediates)}")
        whole = final or self.is_initializing()
        x = self._embed(pixels, grid)
        layer = Block(
            self.heads,
            self.mlp_width,
            "gelu_tanh",
            self.norm_epsilon,
            self.depth,
            self.dtype,
            self.attention,
            biases=(),
            mlp_bias=False,
            gated=True,
            norm="rms",
            attention_scale=1.0,
            parent=None,
        )
        stacked = self.param("layers", stacked_init(layer, self.depth, x[:1, :1, 0]))
        embeddings = {"embeddings": x}
        x, found = run_stack(layer, stacked, x, asked, output_wanted=whole)
        tokens = make_norm("rms", "norm", self.norm_epsilon, self.dtype)(x) if whole else None
        return (tokens if final else None), {name: (found | embeddings)[name] for name in intermediates}

    def _embed(self, pixels: jax.Array, grid: tuple[int, int]) -> jax.Array:
        (rows, columns), side = grid, self.patch_size
        x = pixels.astype(self.dtype).reshape(-1, rows, side, columns, side, 3).swapaxes(2, 3)
        x = x.reshape(-1, rows, columns, side * side * 3)
        init = nn.initializers.normal(self.width**-0.5)
        x = nn.Dense(self.width, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name="patch_embed")(x)
        row = self.param("row_embed", init, (self.positions, self.width))[1 : rows + 1].astype(self.dtype)
        column = self.param("column_embed", init, (self.positions, self.width))[1 : columns + 1].astype(self.dtype)
        return constrain(x + row[:, None] + column, ("batch", "tokens", None, "embed"))


def standardise(pixels: jax.Array) -> jax.Array:
    """Gives every picture the mean 0 and the deviation 1, over all its pixels and channels together.

    Args:
      pixels: (B, H, W, 3), levels 0 to 255.

    Returns:
      float32 of the same shape; a picture of one colour becomes zero.
    """
    x = pixels.astype(jnp.float32)

    def mean(values: jax.Array) -> jax.Array:
        # Rows first: one sum over millions of levels would lose digits in float32.
        return values.mean((2, 3), keepdims=True).mean(1, keepdims=True)

    x = x - mean(x)
    least = 1.0 / math.sqrt(math.prod(pixels.shape[1:]))
    return x / jnp.maximum(jnp.sqrt(mean(jnp.square(x))), least)


def patch_grid(height: int, width: int, max_patches: int, patch_size: int = 16) -> tuple[int, int]:
    """Returns (rows, columns) of the largest grid with about the picture's aspect and at most so many patches.

    The rule of Pix2Struct's image processor: both are rounded down, and at least 1.
    """
    scale = math.sqrt(max_patches * (patch_size / height) * (patch_size / width))
    rows = max(min(math.floor(scale * height / patch_size), max_patches), 1)
    columns = max(min(math.floor(scale * width / patch_size), max_patches), 1)
    return rows, columns


def render(pixels: jax.Array, grid: tuple[int, int], patch_size: int = 16) -> jax.Array:
    """Resizes pictures to a grid of patches, as the image processor does: bilinear, antialiased when shrinking.

    Args:
      pixels: float (B, H, W, 3).
      grid: (rows, columns).
      patch_size: side of a patch.

    Returns:
      (B, rows * patch_size, columns * patch_size, 3).
    """
    shape = (pixels.shape[0], grid[0] * patch_size, grid[1] * patch_size, pixels.shape[3])
    return jax.image.resize(pixels, shape, "bilinear", antialias=True)
