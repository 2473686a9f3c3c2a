"""EfficientNet's convolutional trunk, for inference: every batch norm folded into the convolution before it.

Tan and Le, ICML 2019, arXiv:1905.11946, with TensorFlow's SAME padding; the Lite variants (TPU models
repository) leave squeeze-and-excitation out, bound the activation, and keep the stem's and head's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from tove_jax.errors import InputError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"swish": nn.silu, "relu6": nn.relu6}
Depthwise = Literal["auto", "shifts", "grouped"]

LOGICAL_AXES = (
    (r"(.*/)?stage\d_rest/.*/kernel", ("layers", None, None, None, "embed")),
    (r"(.*/)?stage\d_rest/.*/bias", ("layers", "embed")),
    (r"(.*/)?(stem|head|stage\d_first/.*)/kernel", (None, None, None, "embed")),
    (r"(.*/)?(stem|head|stage\d_first/.*)/bias", ("embed",)),
)


class Stage(NamedTuple):
    """One row of the architecture's table: `repeats` blocks, the first with `stride`."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    width: int


STEM_WIDTH = 32
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def scaled_width(width: int, factor: float) -> int:
    """Returns the width times `factor`, rounded to a multiple of 8 but not down by more than a tenth."""
    rounded = max(8, int(width * factor + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width * factor else rounded


def scaled_stages(width: float, depth: float) -> tuple[Stage, ...]:
    """Returns the table of the variant with these factors (B5: 1.6 and 2.2)."""
    return tuple(
        row._replace(repeats=math.ceil(row.repeats * depth), width=scaled_width(row.width, width)) for row in STAGES
    )


def depthwise_by_shifts(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Depthwise convolution with TensorFlow's SAME padding, as a sum of shifted products.

    XLA's CPU backend runs a grouped convolution without its fast path: for EfficientNet-Lite0's
    shapes this sum is 5 to 50 times faster there.

    Args:
      x: (B, H, W, C).
      kernel: (k, k, 1, C).
      stride: of both axes.

    Returns:
      (B, ceil(H / stride), ceil(W / stride), C).
    """
    size = kernel.shape[0]
    batch, height, width, channels = x.shape
    high, wide = -(-height // stride), -(-width // stride)
    pad_high = max((high - 1) * stride + size - height, 0)
    pad_wide = max((wide - 1) * stride + size - width, 0)
    x = jnp.pad(
        x,
        (
            (0, 0),
            (pad_high // 2, pad_high - pad_high // 2),
            (pad_wide // 2, pad_wide - pad_wide // 2),
            (0, 0),
        ),
    )
    total = jnp.zeros((), x.dtype)
    for i in range(size):
        for j in range(size):
            end = (batch, i + (high - 1) * stride + 1, j + (wide - 1) * stride + 1, channels)
            total = total + lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1)) * kernel[i, j, 0]
    return total


class DepthwiseConvolution(nn.Module):
    """One filter a channel, SAME padding, with a bias.

    Attributes:
      kernel_size: side of the filter.
      stride: of both axes.
      method: ``shifts`` (see `depthwise_by_shifts`), ``grouped`` (one grouped convolution), or
        ``auto``: shifts on CPU, grouped elsewhere.
      dtype: compute dtype.
    """

    kernel_size: int
    stride: int = 1
    method: Depthwise = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), C)."""
        channels, size = x.shape[-1], self.kernel_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, 1, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))
        method = self.method
        if method == "auto":
            method = "shifts" if jax.default_backend() == "cpu" else "grouped"
        if method == "shifts":
            return depthwise_by_shifts(x, kernel, self.stride) + bias
        strides = (self.stride, self.stride)
        return bias + lax.conv_general_dilated(
            x,
            kernel,
            strides,
            "SAME",
            feature_group_count=channels,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Block(nn.Module):
    """MBConv: expansion, depthwise convolution, squeeze-and-excitation, projection.

    Attributes:
      width: of the result; the input is added when stride and width leave its shape.
      kernel_size: of the depthwise convolution.
      stride: of the depthwise convolution.
      expansion: inner width over the input's; at 1 there is no expanding convolution.
      squeeze: width of the squeeze over the input's width; 0: no squeeze-and-excitation.
      activation: key of `ACTIVATIONS`.
      depthwise: see `DepthwiseConvolution`.
      dtype: compute dtype.
    """

    width: int
    kernel_size: int
    stride: int
    expansion: int
    squeeze: float
    activation: str
    depthwise: Depthwise
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), width)."""
        act, channels = ACTIVATIONS[self.activation], x.shape[-1]

        def point(width: int, name: str, y: jax.Array) -> jax.Array:
            return nn.Conv(width, (1, 1), dtype=self.dtype, name=name)(y)

        y = x if self.expansion == 1 else act(point(channels * self.expansion, "expand", x))
        inner = y.shape[-1]
        y = act(DepthwiseConvolution(self.kernel_size, self.stride, self.depthwise, self.dtype, name="depthwise")(y))
        if self.squeeze:
            pooled = y.mean((1, 2), keepdims=True, dtype=jnp.promote_types(y.dtype, jnp.float32)).astype(y.dtype)
            gate = act(point(max(1, int(channels * self.squeeze)), "squeeze", pooled))
            y = y * nn.sigmoid(point(inner, "excite", gate))
        y = point(self.width, "project", y)
        return x + y if y.shape == x.shape and self.stride == 1 else y


class EfficientNet(nn.Module):
    """Stem, stages and head convolution.

    Parameters::

        stem/{kernel (3, 3, 3, S), bias}
        stage{i}_first/{expand, depthwise, squeeze, excite, project}/{kernel, bias}
        stage{i}_rest/...     the stage's other blocks, which are alike, stacked on a leading axis
        head/{kernel (1, 1, W, H), bias}

    Attributes:
      stages: the architecture's table.
      stem_width: S.
      head_width: H.
      head_bias: whether the head has a bias (where no batch norm is folded into it, it has none).
      squeeze: see `Block`.
      activation: key of `ACTIVATIONS`.
      depthwise: see `DepthwiseConvolution`.
      dtype: compute dtype.
    """

    stages: tuple[Stage, ...] = STAGES
    stem_width: int = STEM_WIDTH
    head_width: int = 1280
    head_bias: bool = True
    squeeze: float = 0.25
    activation: str = "swish"
    depthwise: Depthwise = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, *, intermediates: Sequence[str] = ()) -> tuple[jax.Array, dict[str, Any]]:
        """Runs the trunk.

        Args:
          pixels: float (B, H, W, 3), normalised.
          intermediates: names among ``stages/{i}``, the map after stage i.

        Returns:
          (B, ceil(H / 32), ceil(W / 32), head_width), the head convolution without an activation, and a
          dict with exactly the names asked for.

        Raises:
          InputError: pixels of another shape, or an unknown name.
        """
        if pixels.ndim != 4 or pixels.shape[3] != 3:
            raise InputError(f"pixels: expected (batch, height, width, 3), found {pixels.shape}")
        known = [f"stages/{index}" for index in range(len(self.stages))]
        unknown = [name for name in intermediates if name not in known]
        if unknown:
            raise InputError(f"intermediates: expected names among {', '.join(known)}, found {unknown}")
        stem = nn.Conv(self.stem_width, (3, 3), 2, padding="SAME", dtype=self.dtype, name="stem")
        x = ACTIVATIONS[self.activation](stem(pixels.astype(self.dtype)))
        maps = []
        for index, stage in enumerate(self.stages):
            x = self._block(stage, stage.stride, name=f"stage{index}_first")(x)
            if stage.repeats > 1:
                x = self._rest(index, stage, x)
            maps.append(x)
        head = nn.Conv(self.head_width, (1, 1), use_bias=self.head_bias, dtype=self.dtype, name="head")
        return head(x), {name: maps[known.index(name)] for name in intermediates}

    def _block(self, stage: Stage, stride: int, **where: Any) -> Block:
        return Block(
            width=stage.width,
            kernel_size=stage.kernel,
            stride=stride,
            expansion=stage.expansion,
            squeeze=self.squeeze,
            activation=self.activation,
            depthwise=self.depthwise,
            dtype=self.dtype,
            **where,
        )

    def _rest(self, index: int, stage: Stage, x: jax.Array) -> jax.Array:
        block, count = self._block(stage, 1, parent=None), stage.repeats - 1

        def init(rng: jax.Array) -> Any:
            token = jnp.zeros((1, 8, 8, stage.width), jnp.float32)
            return jax.vmap(lambda key: block.init(key, token)["params"])(jax.random.split(rng, count))

        stacked = self.param(f"stage{index}_rest", init)

        def body(x: jax.Array, layer: Any) -> tuple[Any, None]:
            return block.apply({"params": layer}, x), None

        return lax.scan(body, x, stacked)[0]
