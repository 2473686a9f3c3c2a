"""EVA-02's detection backbone (Fang et al., arXiv:2303.11331): a windowed ViT with rotary positions and SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from tove_jax.models import rotary, windowed
from tove_jax.models.block import Block
from tove_jax.models.rotary import Rotary
from tove_jax.models.windowed import WINDOWED, WindowedEncoder

LOGICAL_AXES = (*windowed.LOGICAL_AXES, (r"(.*/)?position_embed", ("tokens", "embed")))


class Eva02Detection(WindowedEncoder):
    """EVA-02 as a detector's backbone: no CLS, no norm at the end.

    Queries and values have a bias, keys have none. Places lie on a grid of `rotary_grid` patches a side: a window
    spans it, and so does the whole picture in a global layer, whatever their size.

    Parameters, beside those of `tove_jax.models.windowed.WindowedEncoder`::

        position_embed (1 + grid * grid, D)      of pretraining; the first row is CLS's and is not used

    Attributes:
      rotary_grid: patches a side in pretraining, in the unit of the rotary angles.
    """

    window: int = 16
    rotary_grid: int = 16

    def block(self, kind: str, grid: tuple[int, int]) -> tuple[Block, Rotary]:
        """Returns an unbound layer, and its rotary tables."""
        layer = Block(
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation="silu",
            norm_epsilon=self.norm_epsilon,
            depth=self.depth,
            dtype=self.dtype,
            implementation=self.attention,
            biases=("query", "value", "out"),
            gated=True,
            mlp_norm=True,
            window=self.window if kind == WINDOWED else 0,
            parent=None,
        )
        return layer, rotary.eva02(self.width // self.heads, grid, self.rotary_grid)

    @nn.compact
    def __call__(
        self, pixels: jax.Array, *, intermediates: Sequence[str] = ()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes pictures.

        Args:
          pixels: float (B, H, W, 3), normalised; sides are multiples of the patch.
          intermediates: ``embeddings`` and ``layers/{i}``, (B, H / p, W / p, D), see `WindowedEncoder.run`.

        Returns:
          The last layer's map (B, H / p, W / p, D), and a dict with exactly the names asked for.

        Raises:
          InputError: pixels of another shape, an unknown name, a layer out of range.
        """
        x = self.embed(pixels)
        count = self.grid * self.grid
        position = self.param("position_embed", nn.initializers.normal(0.02), (1 + count, self.width))
        return self.run(self.place(x, position[1:].reshape(self.grid, self.grid, self.width)), intermediates)
