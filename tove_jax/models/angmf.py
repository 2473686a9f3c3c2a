"""NLL-AngMF: surface normals and their concentration, for inference.

Bae, Budvytis and Cipolla, ICCV 2021, arXiv:2109.09881; the layout of the released PyTorch network with
its EfficientNet-B5 encoder and batch-norm decoder, every batch norm folded into the convolution before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tove_jax.errors import InputError
from tove_jax.models import efficientnet
from tove_jax.models.efficientnet import EfficientNet, Stage, scaled_stages, scaled_width
from tove_jax.models.resize import resize_corners

STRIDE = 32
MIN_KAPPA = 0.01
HEAD_WIDTH = 128

# The stages whose maps the decoder reads, coarsest first: 1/16, 1/8, 1/4 and 1/2 of the picture.
SKIPS = (4, 2, 1, 0)
SCALES = ("scale8", "scale4", "scale2")

LOGICAL_AXES = (
    *((r"(.*/)?encoder/" + pattern.removeprefix("(.*/)?"), axes) for pattern, axes in efficientnet.LOGICAL_AXES),
    (r"(.*/)?(neck|up\d_conv\d)/kernel", (None, None, None, "embed")),
    (r"(.*/)?(neck|up\d_conv\d)/bias", ("embed",)),
    (r"(.*/)?coarse/kernel", (None, None, None, None)),
    (r"(.*/)?refine\d_\d/kernel", (None, "embed", None)),
    (r"(.*/)?(coarse|refine\d_\d)/bias", (None,)),
)


class Pixelwise(nn.Module):
    """A linear map of every pixel; its kernel has the leading axis of a convolution over one axis."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (1, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x.astype(self.dtype) @ kernel[0].astype(self.dtype) + bias.astype(self.dtype)


class AngMF(nn.Module):
    """The network, batch norms folded.

    Attributes:
      width: EfficientNet's width factor.
      depth: EfficientNet's depth factor.
      decoder_width: channels at 1/32; each step up halves them.
      dtype: compute dtype; the normals are normalised in float32 at the least.
    """

    width: float = 1.6
    depth: float = 2.2
    decoder_width: int = 2048
    dtype: Any = jnp.float32

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The encoder's table."""
        return scaled_stages(self.width, self.depth)

    @nn.compact
    def __call__(self, pixels: jax.Array, *, intermediates: Sequence[str] = ()) -> tuple[jax.Array, dict[str, Any]]:
        """Runs the network.

        Args:
          pixels: float (B, H, W, 3), normalised; H and W multiples of 32.
          intermediates: names among ``scale8``, ``scale4`` and ``scale2``, the coarser estimates, in
            the same form, at an eighth, a quarter and a half of the size.

        Returns:
          (B, H, W, 4): the unit normal (x, y, z) and its concentration kappa, above 0.01; and a dict
          with exactly the names asked for.

        Raises:
          InputError: pixels of another shape, or an unknown name.
        """
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.shape[1] % STRIDE or pixels.shape[2] % STRIDE:
            raise InputError(f"pixels: expected (batch, height, width, 3), multiples of {STRIDE}, found {pixels.shape}")
        unknown = [name for name in intermediates if name not in SCALES]
        if unknown:
            raise InputError(f"intermediates: expected names among {', '.join(SCALES)}, found {unknown}")
        encoder = EfficientNet(
            stages=self.stages,
            stem_width=scaled_width(efficientnet.STEM_WIDTH, self.width),
            head_width=scaled_width(1280, self.width),
            head_bias=False,
            dtype=self.dtype,
            name="encoder",
        )
        # The released decoder reads the encoder's last convolution before its norm and activation.
        deep, maps = encoder(pixels, intermediates=tuple(f"stages/{index}" for index in SKIPS))
        x = nn.Conv(self.decoder_width, (1, 1), dtype=self.dtype, name="neck")(deep)
        decoded = []
        for step, skip in enumerate(SKIPS, start=1):
            x = self._up(step, x, maps[f"stages/{skip}"])
            decoded.append(x)
        # At an eighth first, then each scale refines the one before, from the features of that one.
        _, eighth, quarter, half = decoded
        found = {"scale8": _directions(nn.Conv(4, (3, 3), dtype=self.dtype, name="coarse")(eighth))}
        found["scale4"] = self._refine(4, eighth, found["scale8"])
        found["scale2"] = self._refine(2, quarter, found["scale4"])
        return self._refine(1, half, found["scale2"]), {name: found[name] for name in intermediates}

    def _up(self, step: int, x: jax.Array, skip: jax.Array) -> jax.Array:
        """Returns (B, *skip's size, half the width of the step before)."""
        x = jnp.concatenate([resize_corners(x, (skip.shape[1], skip.shape[2])), skip], axis=-1)
        for index in (1, 2):
            conv = nn.Conv(self.decoder_width >> step, (3, 3), dtype=self.dtype, name=f"up{step}_conv{index}")
            x = nn.leaky_relu(conv(x), 0.01)
        return x

    def _refine(self, scale: int, x: jax.Array, estimate: jax.Array) -> jax.Array:
        """Returns directions at twice the size, from features and an estimate of one size."""
        x = jnp.concatenate([x, estimate.astype(x.dtype)], axis=-1)
        # Published after the resize; a linear map of every pixel commutes with it, and costs a quarter before.
        x = Pixelwise(HEAD_WIDTH, self.dtype, name=f"refine{scale}_0")(x)
        x = resize_corners(x, (2 * x.shape[1], 2 * x.shape[2]))
        for index in (1, 2, 3):
            width = HEAD_WIDTH if index < 3 else 4
            x = Pixelwise(width, self.dtype, name=f"refine{scale}_{index}")(nn.relu(x))
        return _directions(x)


def _directions(x: jax.Array) -> jax.Array:
    """Brings three channels to unit length and the fourth above `MIN_KAPPA`, in float32 at the least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    length = jnp.sqrt(jnp.sum(jnp.square(x[..., :3]), axis=-1, keepdims=True)) + 1e-10
    return jnp.concatenate([x[..., :3] / length, nn.elu(x[..., 3:]) + 1.0 + MIN_KAPPA], axis=-1)
