"""DPT: one depth a pixel, read from four layers of a vision transformer.

Ranftl, Bochkovskiy and Koltun, ICCV 2021, arXiv:2103.13413; Depth Anything (Yang et al., CVPR 2024,
arXiv:2401.10891, and its second version, arXiv:2406.09414) puts the same decoder on DINOv2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.errors import InputError
from tove_jax.models import backbone
from tove_jax.models.backbone import VisionBackbone
from tove_jax.models.block import layer_norm
from tove_jax.models.resize import resize_corners

# Sizes of the four maps over the grid of patches.
FACTORS = (4, 2, 1, 0.5)

LOGICAL_AXES = (
    (r"(.*/)?readout\d/kernel", (None, "embed")),
    (r"(.*/)?enlarge\d/kernel", ("embed", None, None, None)),
    (r"(.*/)?(project|reduce|neck|fusion)\d.*/kernel", (None, None, None, "embed")),
    (r"(.*/)?head\d/kernel", (None, None, None, None)),
    (r"(.*/)?(readout|project|reduce|fusion)\d.*/bias", ("embed",)),
    (r"(.*/)?(enlarge|head)\d/bias", (None,)),
    *backbone.LOGICAL_AXES,
)


class Readout(nn.Module):
    """Tells every patch of CLS: GELU of a linear map of both.

    Attributes:
      dtype: compute dtype.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, patches: jax.Array, cls: jax.Array) -> jax.Array:
        """Returns (B, N, D) of patches (B, N, D) and CLS (B, D)."""
        width = patches.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal(width**-0.5), (2 * width, width)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (width,)).astype(self.dtype)
        # The product with the two concatenated; CLS's half is the same for every patch.
        return nn.gelu(patches @ kernel[:width] + (cls @ kernel[width:] + bias)[:, None], approximate=False)


class Enlarge(nn.Module):
    """Transposed convolution whose stride is its kernel's size: every pixel becomes a square.

    Attributes:
      factor: side of the square.
      dtype: compute dtype.
    """

    factor: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, factor H, factor W, C)."""
        batch, high, wide, width = x.shape
        shape = (width, self.factor, self.factor, width)
        kernel = self.param("kernel", nn.initializers.normal(width**-0.5), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (width,)).astype(self.dtype)
        y = jnp.einsum("bhwc,cijd->bhiwjd", x, kernel)
        return y.reshape(batch, high * self.factor, wide * self.factor, width) + bias


class DepthNetwork(nn.Module):
    """A vision transformer, DPT's neck and its depth head.

    Parameters::

        backbone/...                                     see `tove_jax.models.backbone.VisionBackbone`
        [readout{i}/{kernel (2 D, D), bias}]             i = 0 ... 3, from the first layer read to the last
        project{i}/{kernel (1, 1, D, W_i), bias}         then enlarge0, enlarge1 or reduce3
        neck{i}/kernel (3, 3, W_i, F)
        fusion{i}_project, fusion{i}_{inner,outer}{1,2}  i = 0 for the deepest map, which has no inner ones
        head{1,2,3}/{kernel, bias}

    Attributes:
      backbone: fields of `VisionBackbone`.
      layers: indices of the four layers read.
      neck_widths: W_i, channels of the four maps.
      fusion_width: F.
      head_width: channels before the last convolution.
      readout: whether CLS is mixed into the patches (DPT); otherwise it is left out.
      normed: whether the backbone's final norm comes on each layer read (Depth Anything).
      dtype: compute dtype.
    """

    backbone: Mapping[str, Any]
    layers: tuple[int, int, int, int]
    neck_widths: tuple[int, int, int, int]
    fusion_width: int
    head_width: int = 32
    readout: bool = False
    normed: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, *, intermediates: Sequence[str] = ()) -> tuple[jax.Array, dict[str, Any]]:
        """Runs the network.

        Args:
          pixels: float (B, H, W, 3), normalised; H and W multiples of the patch.
          intermediates: names among ``fused`` (B, 8 rows, 8 columns, F), what the head reads, and those of the
            backbone.

        Returns:
          (B, H, W, 1), the inverse depth up to scale and shift, at least zero; and a dict with exactly the names
          asked for.

        Raises:
          InputError: pixels of another shape, or an unknown name.
        """
        trunk = VisionBackbone(**self.backbone, dtype=self.dtype, name="backbone")
        side = trunk.patch_size
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.shape[1] % side or pixels.shape[2] % side:
            raise InputError(f"pixels: expected (batch, height, width, 3), multiples of {side}, found {pixels.shape}")
        names = tuple(f"layers/{index}" for index in self.layers)
        others = tuple(name for name in intermediates if name != "fused")
        _, read = trunk(pixels, intermediates=tuple(dict.fromkeys((*names, *others))), final=False)
        found = {name: read[name] for name in others}
        tokens = [read[name] for name in names]
        if self.normed:
            weights = {"params": trunk.variables["params"]["post_norm"]}
            norm: Any = layer_norm("norm", trunk.norm_epsilon, self.dtype)
            tokens = [norm.apply(weights, x) for x in tokens]
        maps = [self._reassemble(i, x, trunk.grid(pixels), trunk.leading) for i, x in enumerate(tokens)]
        maps = [self._conv(f"neck{i}", self.fusion_width, x, 3, bias=False) for i, x in enumerate(maps)]
        x = self._fuse(maps)
        if "fused" in intermediates:
            found["fused"] = x
        x = resize_corners(self._conv("head1", self.fusion_width // 2, x, 3), (pixels.shape[1], pixels.shape[2]))
        x = nn.relu(self._conv("head2", self.head_width, x, 3))
        return nn.relu(self._conv("head3", 1, x)), found

    def _conv(self, name: str, width: int, x: jax.Array, size: int = 1, stride: int = 1, bias: bool = True) -> Any:
        pad = (size // 2, size // 2)
        return nn.Conv(width, (size, size), stride, (pad, pad), use_bias=bias, dtype=self.dtype, name=name)(x)

    def _reassemble(self, index: int, x: jax.Array, grid: tuple[int, int], leading: int) -> jax.Array:
        """Returns the map of one layer, at its size and with its channels."""
        patches = x[:, leading:]
        if self.readout:
            patches = Readout(self.dtype, name=f"readout{index}")(patches, x[:, 0])
        y = patches.reshape(x.shape[0], *grid, x.shape[-1])
        y = self._conv(f"project{index}", self.neck_widths[index], y)
        factor = FACTORS[index]
        if factor > 1:
            return Enlarge(int(factor), self.dtype, name=f"enlarge{index}")(y)
        return y if factor == 1 else self._conv(f"reduce{index}", self.neck_widths[index], y, 3, int(1 / factor))

    def _fuse(self, maps: Sequence[jax.Array]) -> jax.Array:
        """Adds the maps to each other, from the coarsest on, each time brought to the next one's size."""
        x = None
        for step, skip in enumerate(reversed(maps)):
            x = skip if x is None else x + self._residual(f"fusion{step}_inner", skip)
            x = self._residual(f"fusion{step}_outer", x)
            after = len(maps) - 2 - step
            size = maps[after].shape[1:3] if after >= 0 else (2 * x.shape[1], 2 * x.shape[2])
            # Published the other way round; a linear map of every pixel commutes with the resize.
            x = resize_corners(self._conv(f"fusion{step}_project", self.fusion_width, x), (size[0], size[1]))
        assert x is not None
        return x

    def _residual(self, name: str, x: jax.Array) -> jax.Array:
        y = self._conv(f"{name}1", self.fusion_width, nn.relu(x), 3)
        return x + self._conv(f"{name}2", self.fusion_width, nn.relu(y), 3)
