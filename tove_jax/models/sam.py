"""SAM's image encoder (Kirillov et al., Segment Anything, arXiv:2304.02643): a windowed ViT and a neck."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.models import windowed
from tove_jax.models.block import Block, layer_norm
from tove_jax.models.relative_position import DecomposedPosition
from tove_jax.models.windowed import WINDOWED, WindowedEncoder

LOGICAL_AXES = (
    *windowed.LOGICAL_AXES,
    (r"(.*/)?position_embed", (None, None, "embed")),
    (r"(.*/)?neck/conv1/kernel", (None, None, "embed", None)),
    (r"(.*/)?neck/conv2/kernel", (None, None, None, None)),
    (r"(.*/)?neck/norm[12]/(scale|bias)", (None,)),
)


class Neck(nn.Module):
    """Two convolutions without a bias, 1 x 1 and 3 x 3, each followed by a norm over channels.

    Parameters: ``conv1/kernel`` (1, 1, D, C), ``conv2/kernel`` (3, 3, C, C), ``norm{1,2}/{scale,bias}`` (C,).

    Attributes:
      channels: C.
      norm_epsilon: of both norms.
      dtype: compute dtype.
    """

    channels: int
    norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, H, W, C)."""
        for index, side in ((1, 1), (2, 3)):
            x = nn.Conv(
                self.channels, (side, side), padding="SAME", use_bias=False, dtype=self.dtype, name=f"conv{index}"
            )(x)
            x = layer_norm(f"norm{index}", self.norm_epsilon, self.dtype)(x)
        return x


class SamEncoder(WindowedEncoder):
    """SAM's image encoder, equal to transformers' SamVisionModel.

    Parameters, beside those of `tove_jax.models.windowed.WindowedEncoder`::

        position_embed (grid, grid, D)       neck/...
        layers/{windowed,global}/attention/position/{rows,columns} (L, 2 s - 1, d)   s: window or grid

    The reference takes its published size alone; at another size, position embeddings are resized as ViTDet does,
    bicubically the absolute ones, linearly those of distances in global layers.

    Attributes:
      channels: of the neck's output.
    """

    channels: int = 256
    window: int = 14

    def block(self, kind: str, grid: tuple[int, int]) -> tuple[Block, None]:
        """Returns an unbound layer with decomposed relative positions."""
        trained = self.window if kind == WINDOWED else self.grid
        return Block(
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation="gelu",
            norm_epsilon=self.norm_epsilon,
            depth=self.depth,
            dtype=self.dtype,
            implementation=self.attention,
            position=functools.partial(DecomposedPosition, (trained, trained), grid),
            window=self.window if kind == WINDOWED else 0,
            parent=None,
        ), None

    @nn.compact
    def __call__(
        self, pixels: jax.Array, *, intermediates: Sequence[str] = ()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes pictures.

        Args:
          pixels: float (B, H, W, 3), normalised; sides are multiples of the patch.
          intermediates: ``embeddings`` and ``layers/{i}``, (B, H / p, W / p, D), see `WindowedEncoder.run`.

        Returns:
          The neck's map (B, H / p, W / p, channels), and a dict with exactly the names asked for.

        Raises:
          InputError: pixels of another shape, an unknown name, a layer out of range.
        """
        x = self.embed(pixels)
        position = self.param("position_embed", nn.initializers.zeros, (self.grid, self.grid, self.width))
        x, found = self.run(self.place(x, position), intermediates)
        return Neck(self.channels, self.norm_epsilon, self.dtype, name="neck")(x), found
