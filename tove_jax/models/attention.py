"""The one place where attention is computed, and one row of it for those who want to look."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal["auto", "xla", "cudnn"]


def choose(implementation: Implementation, dtype: jnp.dtype, head_width: int) -> Literal["xla", "cudnn"]:
    """Resolves ``auto``: cuDNN's flash attention on a GPU in half precision, XLA elsewhere.

    On CPU, XLA's own was as fast as einsum and softmax written out (within 5 %, forward and
    backward, batch 128, 65 tokens, 3 heads of 64).

    Args:
      implementation: the setting.
      dtype: of query, key and value.
      head_width: channels a head; cuDNN wants a multiple of 8, at most 128.

    Returns:
      The implementation to ask of `jax.nn.dot_product_attention`.
    """
    if implementation != "auto":
        return implementation
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    fits = head_width % 8 == 0 and head_width <= 128
    return "cudnn" if half and fits and jax.default_backend() == "gpu" else "xla"


def attention(query: jax.Array, key: jax.Array, value: jax.Array, implementation: Implementation = "auto") -> jax.Array:
    """Softmax attention without a mask, scaled by 1/sqrt(head width); the softmax is float32 at the least.

    Args:
      query, key, value: (B, T, heads, head width), one dtype.
      implementation: see `choose`.

    Returns:
      (B, T, heads, head width).
    """
    chosen = choose(implementation, query.dtype, query.shape[-1])
    return jax.nn.dot_product_attention(query, key, value, implementation=chosen)


def attention_row_scores(query: jax.Array, key: jax.Array, row: int = 0) -> jax.Array:
    """Scores of one query against every key, before the softmax, without the (T, T) map.

    Args:
      query, key: (B, T, heads, head width).
      row: which token asks; 0 is CLS.

    Returns:
      (B, heads, T), float32 at the least; `jax.nn.softmax` of it over the last axis is that row of
      the attention probabilities.
    """
    precise = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bhd,bthd->bht", query[:, row], key, preferred_element_type=precise)
    return scores * (query.shape[-1] ** -0.5)
