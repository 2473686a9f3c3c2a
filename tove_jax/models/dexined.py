"""DexiNed: edges from a dense extreme inception network, for inference.

Soria, Riba and Sappa, WACV 2020, arXiv:1909.01955; the layout of the released PyTorch network, every
batch norm folded into the convolution before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from tove_jax.errors import InputError

STRIDE = 16

# Dense layers of blocks 3 to 6, and the widths after blocks 1 to 6.
DENSE_LAYERS = {3: 2, 4: 3, 5: 3, 6: 3}
WIDTHS = (64, 128, 256, 512, 512, 256)
# Factors of two between the blocks' maps and the picture; a side output doubles as often.
DOUBLINGS = (1, 1, 2, 3, 4, 4)
SIDE_WIDTH = 16

LOGICAL_AXES = (
    (r"(.*/)?(block|pre|skip)\d.*/kernel", (None, None, None, "embed")),
    (r"(.*/)?(block|pre|skip)\d.*/bias", ("embed",)),
    (r"(.*/)?(side\d.*|fuse)/kernel", (None, None, None, None)),
    (r"(.*/)?(side\d.*|fuse)/bias", (None,)),
)


class Doubling(nn.Module):
    """Transposed convolution of stride 2 with an even kernel, to exactly twice the size.

    Attributes:
      features: width of the result.
      kernel_size: side of the kernel, even; padding is what doubles the size.
      dtype: compute dtype.
    """

    features: int
    kernel_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, 2 H, 2 W, features).

        Computed as one convolution for each parity of the result's rows and columns, over the
        picture itself rather than over one with zeros between its pixels.
        """
        size, half = self.kernel_size, self.kernel_size // 2
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, self.features, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # As a convolution: mirrored, and input channels before output channels.
        kernel = kernel[::-1, ::-1].swapaxes(2, 3).astype(self.dtype)
        batch, high, wide, _ = x.shape
        # Row 2 i + parity sums taps first, first + 2, ... over the input's rows from i - low on.
        firsts = [(half - parity) % 2 for parity in (0, 1)]
        lows = [(half - parity - first) // 2 for parity, first in enumerate(firsts)]
        pads = [(low, half - 1 - low) for low in lows]
        parts = [
            lax.conv_general_dilated(
                x.astype(self.dtype),
                kernel[firsts[down] :: 2, firsts[right] :: 2],
                (1, 1),
                (pads[down], pads[right]),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            for down in (0, 1)
            for right in (0, 1)
        ]
        y = jnp.stack(parts, axis=3).reshape(batch, high, wide, 2, 2, self.features)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * high, 2 * wide, self.features)
        return y + bias.astype(self.dtype)


class DexiNed(nn.Module):
    """The network, batch norms folded.

    Attributes:
      dtype: compute dtype.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, *, intermediates: Sequence[str] = ()) -> tuple[jax.Array, dict[str, Any]]:
        """Runs the network.

        Args:
          pixels: float (B, H, W, 3), BGR less the mean, values around [-124, 151]; H and W multiples
            of 16.
          intermediates: names among ``side1`` ... ``side6``, the logits (B, H, W, 1) of each block.

        Returns:
          logits (B, H, W, 1) of the fused edge map, whose sigmoid is the edge probability, and a
          dict with exactly the names asked for.

        Raises:
          InputError: pixels of another shape, or an unknown name.
        """
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.shape[1] % STRIDE or pixels.shape[2] % STRIDE:
            raise InputError(f"pixels: expected (batch, height, width, 3), multiples of {STRIDE}, found {pixels.shape}")
        known = [f"side{n}" for n in range(1, 1 + len(WIDTHS))]
        unknown = [name for name in intermediates if name not in known]
        if unknown:
            raise InputError(f"intermediates: expected names among {', '.join(known)}, found {unknown}")
        x = pixels.astype(self.dtype)
        one = self._conv("block1_conv2", 64, nn.relu(self._conv("block1_conv1", 32, x, 3, 2)), 3)
        one = nn.relu(one)
        two = self._conv("block2_conv2", 128, nn.relu(self._conv("block2_conv1", 128, one, 3)), 3)

        two_down = _halve(two)
        two_sum = two_down + self._conv("skip1", 128, one, 1, 2)
        three = self._dense(3, two_sum, self._conv("pre3", 256, two_down))

        three_down = _halve(three)
        three_sum = three_down + self._conv("skip2", 256, two_sum, 1, 2)
        four = self._dense(4, three_sum, self._conv("pre4", 512, three_down + self._conv("pre2", 256, two_down, 1, 2)))

        four_down = _halve(four)
        four_sum = four_down + self._conv("skip3", 512, three_sum, 1, 2)
        five = self._dense(5, four_sum, self._conv("pre5", 512, four_down))

        five_sum = five + self._conv("skip4", 512, four_sum)
        six = self._dense(6, five_sum, self._conv("pre6", 256, five))

        maps = (one, two, three, four, five, six)
        sides = [self._side(number, x) for number, x in enumerate(maps, start=1)]
        fused = self._conv("fuse", 1, jnp.concatenate(sides, axis=-1))
        return fused, {name: sides[known.index(name)] for name in intermediates}

    def _conv(self, name: str, width: int, x: jax.Array, size: int = 1, stride: int = 1, pad: int = -1) -> jax.Array:
        pad = size // 2 if pad < 0 else pad
        padding = ((pad, pad), (pad, pad))
        return nn.Conv(width, (size, size), stride, padding, dtype=self.dtype, name=name)(x)

    def _dense(self, block: int, x: jax.Array, beside: jax.Array) -> jax.Array:
        """Returns the block's map; every layer is averaged with `beside`."""
        width = WIDTHS[block - 1]
        for layer in range(1, 1 + DENSE_LAYERS[block]):
            # Padded twice in the first convolution and not in the second, as released.
            y = self._conv(f"block{block}_layer{layer}_conv1", width, nn.relu(x), 3, pad=2)
            y = self._conv(f"block{block}_layer{layer}_conv2", width, nn.relu(y), 3, pad=0)
            x = 0.5 * (y + beside)
        return x

    def _side(self, number: int, x: jax.Array) -> jax.Array:
        """Returns one logit a pixel at the picture's size."""
        doublings = DOUBLINGS[number - 1]
        for step in range(doublings):
            width = 1 if step == doublings - 1 else SIDE_WIDTH
            x = nn.relu(self._conv(f"side{number}_conv{step}", width, x))
            x = Doubling(width, 2**doublings, self.dtype, name=f"side{number}_up{step}")(x)
        return x


def _halve(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
