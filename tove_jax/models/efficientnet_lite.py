"""EfficientNet-Lite0, for inference.

Tan and Le, 2019, arXiv:1905.11946, and the Lite variants of the TPU models repository: MBConv
blocks without squeeze-and-excitation, ReLU6, every batch norm folded into the convolution before it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

HEAD_WIDTH = 1280
STEM_WIDTH = 32


class Stage(NamedTuple):
    """One row of the architecture's table: `repeats` blocks, the first with `stride`."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    width: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def blocks() -> list[tuple[int, int, int, int, int]]:
    """Returns (kernel, stride, expansion, width in, width out) of each of the 16 blocks, in order."""
    rows, width = [], STEM_WIDTH
    for stage in STAGES:
        for repeat in range(stage.repeats):
            rows.append((stage.kernel, stage.stride if repeat == 0 else 1, stage.expansion, width, stage.width))
            width = stage.width
    return rows


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
    """

    kernel_size: int
    stride: int = 1
    method: Literal["auto", "shifts", "grouped"] = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), C)."""
        channels, size = x.shape[-1], self.kernel_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, 1, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
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


class EfficientNetLite0(nn.Module):
    """The network, batch norms folded.

    Attributes:
      classes: width of the classifier.
      depthwise: how depthwise convolutions run, see `DepthwiseConvolution`.
    """

    classes: int = 1000
    depthwise: Literal["auto", "shifts", "grouped"] = "auto"

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Runs the network.

        Args:
          images: float (B, S, S, 3), normalised; S a multiple of 32.

        Returns:
          logits (B, classes) and ``{"map": (B, S/32, S/32, 1280) after the last convolution,
          "pooled": (B, 1280) its mean over space}``.
        """
        x = jax.nn.relu6(nn.Conv(STEM_WIDTH, (3, 3), 2, padding="SAME", name="stem")(images))
        for index, (kernel, stride, expansion, width_in, width_out) in enumerate(blocks()):
            y = x
            if expansion != 1:
                y = jax.nn.relu6(nn.Conv(width_in * expansion, (1, 1), name=f"block{index}_expand")(y))
            y = DepthwiseConvolution(kernel, stride, self.depthwise, name=f"block{index}_depthwise")(y)
            y = nn.Conv(width_out, (1, 1), name=f"block{index}_project")(jax.nn.relu6(y))
            x = x + y if stride == 1 and width_in == width_out else y
        x = jax.nn.relu6(nn.Conv(HEAD_WIDTH, (1, 1), name="head")(x))
        pooled = x.mean((1, 2))
        logits = nn.Dense(self.classes, name="classifier")(pooled)
        return logits, {"map": x, "pooled": pooled}
