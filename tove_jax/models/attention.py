"""The one place where attention is computed, and one row of it for those who want to look."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from tove_jax.errors import InputError
from tove_jax.models import tpu_attention

Implementation = Literal["auto", "xla", "cudnn", "pallas"]


def choose(implementation: Implementation, dtype: jnp.dtype, head_width: int) -> Literal["xla", "cudnn", "pallas"]:
    """Resolves ``auto``: flash attention in half precision, cuDNN's on GPUs, our kernels on TPUs; XLA's elsewhere.

    On CPU, XLA's own was as fast as einsum and softmax written out (within 5 %, forward and
    backward, batch 128, 65 tokens, 3 heads of 64).

    Args:
      implementation: the setting.
      dtype: of query, key and value.
      head_width: channels a head; cuDNN wants a multiple of 8, at most 128; for kernels on TPUs see `tove_jax.models.tpu_attention.suits`.

    Returns:
      ``pallas`` is `tove_jax.models.tpu_attention`, the others are asked of `jax.nn.dot_product_attention`.
    """
    if implementation != "auto":
        return implementation
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    if not half or head_width % 8 or head_width > 128:
        return "xla"
    return {"gpu": "cudnn", "cuda": "cudnn", "tpu": "pallas"}.get(platform(), "xla")  # type: ignore[return-value]


def platform() -> str:
    """Returns what is compiled for: the platform of the mesh in use, whose chips need not be there, or the default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    implementation: Implementation = "auto",
    *,
    scale: float | None = None,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """Softmax attention; the softmax is float32 at the least.

    Args:
      query: (B, T, heads, head width).
      key, value: (B, S, heads, head width), the query's dtype; or with fewer heads, each shared by as many
        neighbouring heads of the query.
      implementation: see `choose`; ``auto`` is XLA's where there is a bias or a mask, and on TPUs where there is a
        window or `tove_jax.models.tpu_attention.suits` refuses.
      scale: of the scores; None: 1/sqrt(head width).
      bias: (B, heads, T, S), added to the scaled scores; or None.
      mask: bool (B, S), False for keys that no query may look at; or (B, T, S), a row a query; or None.
      causal: queries see no later key.
      window: with `causal`, the number of keys that a query sees at most, its own among them; None: all.

    Returns:
      (B, T, heads, head width).
    """
    if implementation == "auto" and (bias is not None or mask is not None):
        implementation = "xla"
    chosen = choose(implementation, query.dtype, query.shape[-1])
    if chosen == "pallas" and implementation == "auto" and not (window is None and tpu_attention.suits(query, key)):
        chosen = "xla"
    if chosen == "pallas":
        if bias is not None or mask is not None or window is not None:
            raise InputError("attention 'pallas' takes neither bias nor mask nor window; take 'auto'")
        return tpu_attention.tpu_attention(query, key, value, scale=scale, causal=causal)
    keys = None if mask is None else mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        keys,
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=chosen,
    )


def attention_row_scores(query: jax.Array, key: jax.Array, row: int = 0, scale: float | None = None) -> jax.Array:
    """Scores of one query against every key, before the softmax, without the (T, T) map.

    Args:
      query, key: (B, T, heads, head width).
      row: which token asks; 0 is CLS.
      scale: of the scores; None: 1/sqrt(head width).

    Returns:
      (B, heads, T), float32 at the least; `jax.nn.softmax` of it over the last axis is that row of
      the attention probabilities.
    """
    precise = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bhd,bthd->bht", query[:, row], key, preferred_element_type=precise)
    return scores * (query.shape[-1] ** -0.5 if scale is None else scale)
