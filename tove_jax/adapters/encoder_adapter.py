"""Encoder adapters: a teacher's tokens brought to the student's grid and width, while training only."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from tove_jax.adapters.initializers import torch_linear
from tove_jax.errors import InputError

LOGICAL_AXES = (
    (r"(.*/)?channel/kernel", (None, "embed")),
    (r"(.*/)?channel/bias", ("embed",)),
    (r"(.*/)?token/kernel", ("teacher", "tokens")),
    (r"(.*/)?token/bias", ("tokens",)),
)


class TokenLinear(nn.Module):
    """A linear map over tokens: ``out[:, n] = sum_m kernel[m, n] x[:, m] + bias[n]``.

    Attributes:
      tokens: number of output tokens N.
      dtype: compute dtype; None promotes.
    """

    tokens: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, N_t, D) to (B, N, D)."""
        count = x.shape[-2]
        kernel = self.param("kernel", torch_linear(count), (count, self.tokens))
        bias = self.param("bias", torch_linear(count), (self.tokens,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return jnp.einsum("bmd,mn->bnd", x, kernel) + bias[:, None]


class EncoderAdapter(nn.Module):
    """Channel Linear, exact GELU, token Linear (MoVE-KD's encoder adapter).

        t~ = (W2 . GELU((t W1 + b1)^T) + b2)^T

    Parameters ``channel/{kernel (d_t, D), bias (D,)}`` and ``token/{kernel (N_t, N), bias (N,)}``,
    drawn as ``torch.nn.Linear`` draws. With ``interpolate`` there is no token Linear and no GELU: the
    teacher's grid is resized bilinearly (half-pixel centres, no antialias: torch's
    ``interpolate(mode="bilinear")``), then goes through the channel Linear; the paper's naive
    ablation.

    Attributes:
      tokens: student tokens N; a square grid for ``interpolate``.
      width: student width D.
      interpolate: see above.
      dtype: compute dtype; None promotes.
    """

    tokens: int
    width: int
    interpolate: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """Maps a teacher's patches (B, H, W, d_t) to targets (B, N, D)."""
        batch, height, wide, channels = patches.shape
        init = torch_linear(channels)
        channel = nn.Dense(self.width, dtype=self.dtype, kernel_init=init, bias_init=init, name="channel")
        if self.interpolate:
            side = math.isqrt(self.tokens)
            if side * side != self.tokens:
                raise InputError(f"interpolated targets need a square student grid, found {self.tokens} tokens")
            resized = jax.image.resize(patches, (batch, side, side, channels), "bilinear", antialias=False)
            return channel(resized.reshape(batch, self.tokens, channels))
        hidden = channel(patches.reshape(batch, height * wide, channels))
        return TokenLinear(self.tokens, self.dtype, name="token")(nn.gelu(hidden, approximate=False))
