"""HED: holistically-nested edge detection on VGG16 (Xie and Tu, ICCV 2015, arXiv:1504.06375)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class HED(nn.Module):
    """VGG16's five blocks, a one-channel side output on each, and their fusion."""

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Runs the network.

        Args:
          images: float (B, H, W, 3), BGR less Caffe's mean, values around [-124, 151].

        Returns:
          fused edge probability (B, H, W) in [0, 1], and ``{"side1" ... "side5": (B, H, W)
          probabilities of each scale, resized bilinearly (half-pixel centres) to the input,
          "map": (B, ceil(H/16), ceil(W/16), 512), the ReLU of conv5_3}``.
        """
        batch, height, width, _ = images.shape
        x, logits = images, []
        for block, widths in enumerate(BLOCKS, start=1):
            if block > 1:
                x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
            for index, channels in enumerate(widths, start=1):
                x = jax.nn.relu(nn.Conv(channels, (3, 3), padding="SAME", name=f"conv{block}_{index}")(x))
            side = nn.Conv(1, (1, 1), name=f"side{block}")(x)
            logits.append(jax.image.resize(side, (batch, height, width, 1), "bilinear"))
        fused = nn.Conv(1, (1, 1), name="fuse")(jnp.concatenate(logits, axis=-1))
        sides = {f"side{n}": jax.nn.sigmoid(logit[..., 0]) for n, logit in enumerate(logits, start=1)}
        return jax.nn.sigmoid(fused[..., 0]), {**sides, "map": x}
