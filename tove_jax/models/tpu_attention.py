"""Flash attention on TPUs, fitted to any length and to a mesh.

Two kernels: `tove_jax.models.short_rows` for rows that one block holds, as pictures are; JAX's splash attention for
longer and causal ones, as texts are, whose rows it wants padded and with the heads before the tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tove_jax.errors import InputError
from tove_jax.models import short_rows
from tove_jax.parallel.mesh import ACTIVATION_RULES, BATCH_AXES, partition_spec

LANES = 128  # Splash's blocks are multiples of a vector register's width.
WHOLE = 640  # Up to so many tokens are one block of splash.
RESIDUALS = "splash"  # Name of what splash's backward pass needs, for policies of `jax.checkpoint`.
TOLERANCE = 0.03  # Some eight roundings of bfloat16.
BLOCK = 512  # Longer rows are cut into blocks of at most so many.


def block_of(length: int) -> tuple[int, int]:
    """Returns the tokens of a block and of the padded row, for rows of so many tokens."""
    count = 1 if length <= WHOLE else -(-length // BLOCK)
    block = -(-length // (count * LANES)) * LANES
    return block, count * block


def suits(query: jax.Array, key: jax.Array) -> bool:
    """Returns whether the kernels compute attention of these shapes on the mesh in use.

    They need as many keys as queries, heads that fill a register evenly, and whole rows on each device. Without a mesh, on several devices, the compiler
    could not split them.
    """
    batch, length, heads, width = query.shape
    if key.shape[1] != length or LANES % width or heads % key.shape[2]:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not _automatic(mesh):
        return not mesh.empty or jax.device_count() == 1
    if not set(BATCH_AXES) <= set(mesh.shape):
        return mesh.size == 1
    shards = 1
    for axis in BATCH_AXES:
        shards *= mesh.shape[axis]
    return batch % shards == 0


def tpu_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention without maps in main memory; the softmax and the sums are float32.

    Args:
      query: (B, T, heads, head width).
      key, value: (B, T, heads or a divisor of them, head width).
      scale: of the scores; None: 1/sqrt(head width).
      causal: queries see no later key.
      interpret: run the kernels as plain operations, on any device.

    Returns:
      (B, T, heads, head width).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        batch, length, heads, width = query.shape
        if causal or heads != key.shape[2] or not short_rows.fits(length, heads, width):
            return _splash(query, key, value, scale, causal, interpret)
        flat = (x.reshape(batch, length, heads * width) for x in (query, key, value))
        return short_rows.attend(*flat, width, scale, interpret).reshape(query.shape)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not _automatic(mesh):
        return attend(query, key, value)
    # The compiler cannot split a kernel, so each device is given its own rows and heads.
    axes = ("batch", None, "heads", None)
    spec = partition_spec(axes, query.shape, mesh, ACTIVATION_RULES)
    if partition_spec(axes, key.shape, mesh, ACTIVATION_RULES) != spec:
        spec = PartitionSpec(spec[0])
    return jax.shard_map(attend, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(query, key, value)


def check_kernel(
    length: int, heads: int, key_heads: int, width: int, dtype: Any, *, causal: bool = False, interpret: bool = False
) -> float:
    """Compares a kernel, and its gradients, with attention written out in float32, on this device and drawn arrays.

    Compilers and chips change; a kernel that goes wrong would train on wrong numbers for days. It takes seconds.

    Args:
      length: tokens of a row.
      heads: of queries.
      key_heads: of keys and values.
      width: of a head.
      dtype: of query, key and value.
      causal: queries see no later key.
      interpret: run the kernel as plain operations, on any device.

    Returns:
      The largest deviation, as a share of the largest entry.

    Raises:
      InputError: it is more than `TOLERANCE`; names the shape and the setting that leaves the kernel out.
    """
    shapes = [(1, length, count, width) for count in (heads, key_heads, key_heads, heads)]
    drawn = [
        jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)
    ]
    *arrays, weight = (x.astype(dtype) for x in drawn)

    def judged(attend: Any, arrays: list[jax.Array]) -> tuple[jax.Array, ...]:
        def loss(*given: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attend(*given).astype(jnp.float32)
            return (out * weight).sum(), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return out, *gradients

    found = judged(lambda *given: tpu_attention(*given, causal=causal, interpret=interpret), arrays)
    with jax.default_matmul_precision("highest"):
        whole = [x.astype(jnp.float32) for x in arrays]
        expected = judged(lambda *given: jax.nn.dot_product_attention(*given, is_causal=causal), whole)
    deviations = [jnp.abs(f - e).max() / jnp.abs(e).max() for f, e in zip(found, expected, strict=True)]
    worst = float(jnp.stack(deviations).max())
    if not worst <= TOLERANCE:
        raise InputError(
            f"attention 'pallas': on this {jax.local_devices()[0].device_kind} the kernel for rows of {length} tokens, "
            f"{heads} heads of {width}, is {worst:.1%} of the largest entry away from attention written out (expected at "
            f"most {TOLERANCE:.0%}); set config.student.attention and config.language.attention to 'xla'"
        )
    return worst


def _automatic(mesh: Any) -> bool:
    """Returns whether the compiler splits arrays over the mesh's axes; not inside `jax.shard_map`."""
    return not mesh.manual_axes


def _splash(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float, causal: bool, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        FullMask,
        MultiHeadMask,
        QKVLayout,
        SegmentIds,
        make_splash_mha,
    )

    length, heads = query.shape[1:3]
    # It knows no scale; that of heads of 64 is a power of two, which rounds nothing.
    query = (query * jnp.asarray(scale, jnp.promote_types(query.dtype, jnp.float32))).astype(query.dtype)
    block, padded = block_of(length)
    shape = (padded, padded)
    mask = MultiHeadMask([CausalMask(shape) if causal else FullMask(shape) for _ in range(heads)])
    sizes = BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
        q_layout=QKVLayout.HEAD_DIM_MINOR,
        k_layout=QKVLayout.HEAD_DIM_MINOR,
        v_layout=QKVLayout.HEAD_DIM_MINOR,
    )
    kernel = make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=RESIDUALS, interpret=interpret
    )

    def rows(x: jax.Array) -> jax.Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - length), (0, 0)))

    segments = None
    if padded > length and not causal:  # Of a causal row no token sees the padding behind it.
        own = jnp.arange(padded) < length
        segments = SegmentIds(own.astype(jnp.int32), own.astype(jnp.int32))
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(rows(query), rows(key), rows(value))
    return out[:, :, :length].swapaxes(1, 2)
