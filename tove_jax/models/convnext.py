"""ConvNeXt and ConvNeXt-V2, the blocks of a stage stacked and scanned, with named intermediates on request.

Liu et al., A ConvNet for the 2020s, CVPR 2022, arXiv:2201.03545; Woo et al., ConvNeXt V2, CVPR 2023,
arXiv:2301.00808.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.errors import InputError
from tove_jax.models.block import layer_norm, stacked_init
from tove_jax.models.efficientnet import Depthwise, DepthwiseConvolution
from tove_jax.parallel import constrain

LOGICAL_AXES = (
    (r"(.*/)?(stem|downsample\d)/kernel", (None, None, None, "embed")),
    (r"(.*/)?(stem|downsample\d)/bias", ("embed",)),
    (r"(.*/)?stage\d/depthwise/kernel", ("layers", None, None, None, "embed")),
    (r"(.*/)?stage\d/(depthwise|fc2)/bias", ("layers", "embed")),
    (r"(.*/)?stage\d/norm/(scale|bias)", ("layers", "embed")),
    (r"(.*/)?stage\d/fc1/kernel", ("layers", "embed", "mlp")),
    (r"(.*/)?stage\d/fc1/bias", ("layers", "mlp")),
    (r"(.*/)?stage\d/response_norm/(scale|bias)", ("layers", "mlp")),
    (r"(.*/)?stage\d/fc2/kernel", ("layers", "mlp", "embed")),
    (r"(.*/)?stage\d/layer_scale", ("layers", "embed")),
    (r"(.*/)?(stem_norm|downsample\d_norm|norm)/(scale|bias)", ("embed",)),
)

MAP = ("batch", None, None, "embed")
EXPANSION = 4


class ResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt-V2 (its equations 1 to 3, with the released residual form)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to the same shape; the norms over space are float32 at the least."""
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.zeros, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        norms = jnp.sqrt(jnp.square(precise).sum((1, 2), keepdims=True))
        share = norms / (norms.mean(-1, keepdims=True) + 1e-6)
        return (scale * (precise * share) + bias + precise).astype(x.dtype)


class Block(nn.Module):
    """A depthwise 7 x 7 convolution and an inverted bottleneck over channels, both in one residual branch."""

    norm_epsilon: float
    response_norm: bool
    dtype: Any
    depthwise: Depthwise

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to the same shape."""
        width = x.shape[-1]
        init = nn.initializers.truncated_normal(0.02)
        y = DepthwiseConvolution(7, method=self.depthwise, dtype=self.dtype, name="depthwise")(x)
        y = layer_norm("norm", self.norm_epsilon, self.dtype)(y)
        y = nn.Dense(EXPANSION * width, dtype=self.dtype, kernel_init=init, name="fc1")(y)
        y = jax.nn.gelu(constrain(y, ("batch", None, None, "mlp")), approximate=False)
        if self.response_norm:
            y = ResponseNorm(name="response_norm")(y)
        y = nn.Dense(width, dtype=self.dtype, kernel_init=init, name="fc2")(y)
        if not self.response_norm:
            y = y * self.param("layer_scale", nn.initializers.constant(1e-6), (width,)).astype(y.dtype)
        return constrain(x + y, MAP)


class ConvNeXt(nn.Module):
    """ConvNeXt without its classifier, equal to transformers' ConvNextModel and ConvNextV2Model and to timm's.

    Parameters, everything under ``stage<i>/`` stacked on a leading axis of length ``depths[i]``::

        stem/{kernel (p, p, 3, D0), bias}   stem_norm/{scale, bias}
        downsample<i>_norm/{scale, bias}    downsample<i>/{kernel (2, 2, D(i-1), Di), bias}      from i = 1
        stage<i>/depthwise/{kernel (L, 7, 7, 1, D), bias}      stage<i>/norm/{scale, bias}
        stage<i>/fc1/{kernel (L, D, 4 D), bias}                stage<i>/fc2/{kernel (L, 4 D, D), bias}
        stage<i>/layer_scale (L, D)                            stage<i>/response_norm/{scale, bias} (L, 4 D)
        norm/{scale, bias}

    with a layer scale in the first version and a response norm in the second.

    Attributes:
      widths: channels of each stage.
      depths: blocks of each stage.
      response_norm: ConvNeXt-V2.
      patch_size: stride of the stem.
      norm_epsilon: of every layer norm but the last.
      final_epsilon: of the layer norm over the pooled channels.
      dtype: compute dtype; norm statistics are float32 at the least.
      depthwise: how depthwise convolutions run, see `tove_jax.models.efficientnet.DepthwiseConvolution`.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    response_norm: bool = False
    patch_size: int = 4
    norm_epsilon: float = 1e-6
    final_epsilon: float = 1e-12
    dtype: Any = jnp.float32
    depthwise: Depthwise = "auto"

    @nn.compact
    def __call__(
        self, pixels: jax.Array, *, intermediates: Sequence[str] = (), final: bool = True
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Encodes pictures; stages that nothing asked for needs are not run.

        Args:
          pixels: float (B, H, W, 3), normalised; H and W at least the whole stride (32), what no stride
            fills is cut off at the right and bottom.
          intermediates: names among ``stem``, the normed map of the stem; ``stages/{i}``, the map after
            stage i, negative counting from the end; ``pooled`` (B, D), the layer norm of the last map's
            mean (transformers' ``pooler_output``, timm's head before its classifier).
          final: whether the last stage's map is wanted.

        Returns:
          (B, H / 32, W / 32, D), the last stage's map before norm and pooling (None unless ``final``),
          and a dict with exactly the names asked for.

        Raises:
          InputError: pixels of another shape or too small, an unknown name, a stage out of range.
        """
        stages = len(self.depths)
        stride = self.patch_size * 2 ** (stages - 1)
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or min(pixels.shape[1:3]) < stride:
            raise InputError(
                f"pixels: expected (batch, height, width, 3), both at least {stride}, found {pixels.shape}"
            )
        asked = {name: _stage(name, stages) for name in intermediates}
        last = stages - 1 if final or self.is_initializing() else max([-1, *asked.values()])
        found: dict[int, jax.Array] = {}
        init, size = nn.initializers.truncated_normal(0.02), self.patch_size
        x = pixels.astype(self.dtype)
        stem = nn.Conv(self.widths[0], (size, size), size, "VALID", dtype=self.dtype, kernel_init=init, name="stem")
        found[-1] = x = constrain(layer_norm("stem_norm", self.norm_epsilon, self.dtype)(stem(x)), MAP)
        block = Block(self.norm_epsilon, self.response_norm, self.dtype, self.depthwise, parent=None)
        for stage in range(last + 1):
            width = self.widths[stage]
            if stage:
                x = layer_norm(f"downsample{stage}_norm", self.norm_epsilon, self.dtype)(x)
                halve = nn.Conv(
                    width, (2, 2), 2, "VALID", dtype=self.dtype, kernel_init=init, name=f"downsample{stage}"
                )
                x = constrain(halve(x), MAP)
            stacked = self.param(f"stage{stage}", stacked_init(block, self.depths[stage], x[:1, :1, :1]))
            found[stage] = x = _scan(block, stacked, x)
        if "pooled" in asked or self.is_initializing():
            mean = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
            pooled = layer_norm("norm", self.final_epsilon, self.dtype)(mean)
        named = {name: pooled if name == "pooled" else found[stage] for name, stage in asked.items()}
        return (x if final else None), named


def _scan(block: Block, stacked: Any, x: jax.Array) -> jax.Array:
    def body(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
        y: Any = block.apply({"params": params}, x)
        return y, None

    return jax.lax.scan(body, x, stacked)[0]


def _stage(name: str, stages: int) -> int:
    """Returns the stage that must have run for an intermediate; -1 is the stem."""
    match = re.fullmatch(r"stages/(-?\d+)", name)
    if match:
        if not -stages <= int(match[1]) < stages:
            raise InputError(f"intermediate '{name}': the encoder has {stages} stages")
        return int(match[1]) % stages
    if name not in ("stem", "pooled"):
        raise InputError(f"intermediate '{name}': expected stem, stages/<i> or pooled")
    return -1 if name == "stem" else stages - 1
