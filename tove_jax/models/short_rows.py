"""Flash attention of short rows on TPUs: a row's maps stay in fast memory, and nothing is laid out anew.

A kernel takes all tokens of one picture and as many heads as fill a vector register's 128 lanes, from arrays that lie
as the projections leave them, (B, T, heads x head width). So there is no transposed copy and no padding in main memory,
as `tove_jax.models.splash` needs. Heads that share a register are told apart by zeroing the other's lanes in one
factor of a product, which costs nothing: the matrix unit is as deep as a register is wide. The backward pass computes
the maps again from queries and keys and keeps nothing else (FlashAttention, arXiv 2205.14135, with one block).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128
LONGEST = 768  # Four float32 maps of so many tokens are 9.4 MB; a kernel may use 16.


def fits(length: int, heads: int, width: int) -> bool:
    """Returns whether the kernel computes rows of so many tokens."""
    return length <= LONGEST and LANES % width == 0 and heads * width % LANES == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, width: int, scale: float, interpret: bool = False
) -> jax.Array:
    """Returns softmax attention of every head; softmax and sums are float32.

    Args:
      query, key, value: (B, T, heads x head width).
      width: of a head.
      scale: of the scores.
      interpret: run the kernel as plain operations, on any device.
    """
    return _call(_forward, (query, key, value), 1, width, scale, interpret)[0]


def _attend_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, width: int, scale: float, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return attend(query, key, value, width, scale, interpret), (query, key, value)


def _attend_backward(
    width: int, scale: float, interpret: bool, kept: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    return _call(_backward, (*kept, gradient), 3, width, scale, interpret)


attend.defvjp(_attend_forward, _attend_backward)


def _call(
    kernel: Any, arrays: tuple[jax.Array, ...], results: int, width: int, scale: float, interpret: bool
) -> tuple[jax.Array, ...]:
    from jax.experimental import pallas as pl

    batch, length, channels = arrays[0].shape
    block = pl.BlockSpec((None, length, LANES), lambda row, column: (row, 0, column))
    shape = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
    products = 2 if kernel is _forward else 5
    maps = batch * length * length * channels // width
    cost = pl.CostEstimate(
        flops=2 * products * maps * width,
        transcendentals=maps,
        bytes_accessed=(len(arrays) + results) * arrays[0].size * arrays[0].dtype.itemsize,
    )
    return pl.pallas_call(
        functools.partial(kernel, width=width, scale=scale),
        out_shape=(shape,) * results,
        grid=(batch, channels // LANES),
        in_specs=[block] * len(arrays),
        out_specs=(block,) * results,
        cost_estimate=cost,
        interpret=interpret,
        name=f"attention{kernel.__name__}",
    )(*arrays)


def _product(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Sums over one axis of each, in float32."""
    return jax.lax.dot_general(left, right, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _own(x: jax.Array, head: int, width: int) -> jax.Array:
    """Returns x with the other heads' lanes zero."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane // width == head, x, jnp.zeros_like(x))


def _forward(query: Any, key: Any, value: Any, out: Any, *, width: int, scale: float) -> None:
    q, k, v = query[...], key[...], value[...]
    total = jnp.zeros(q.shape, jnp.float32)
    for head in range(LANES // width):
        scores = _product(_own(q, head, width), k, (1, 1)) * scale
        probs = jnp.exp(scores - scores.max(axis=1, keepdims=True))
        weights = probs.sum(axis=1, keepdims=True)
        total += _own(_product(probs.astype(v.dtype), v, (1, 0)) / weights, head, width)
    out[...] = total.astype(out.dtype)


def _backward(
    query: Any, key: Any, value: Any, gradient: Any, dquery: Any, dkey: Any, dvalue: Any, *, width: int, scale: float
) -> None:
    q, k, v, g = query[...], key[...], value[...], gradient[...]
    dq = dk = dv = jnp.zeros(q.shape, jnp.float32)
    for head in range(LANES // width):
        q_own, k_own, g_own = (_own(x, head, width) for x in (q, k, g))
        # Keys down, queries across, so that one product alone needs a map turned.
        scores = _product(k, q_own, (1, 1)) * scale
        probs = jnp.exp(scores - scores.max(axis=0, keepdims=True))
        probs = probs / probs.sum(axis=0, keepdims=True)
        dprobs = _product(v, g_own, (1, 1))
        dscores = probs * (dprobs - (probs * dprobs).sum(axis=0, keepdims=True)) * scale
        probs, dscores = probs.astype(q.dtype), dscores.astype(q.dtype)
        dv += _product(probs, g_own, (1, 0))
        dk += _product(dscores, q_own, (1, 0))
        dq += _product(dscores, k_own, (0, 0))
    dquery[...], dkey[...], dvalue[...] = (x.astype(q.dtype) for x in (dq, dk, dv))
