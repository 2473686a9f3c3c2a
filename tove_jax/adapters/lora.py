"""Several low-rank maps beside one linear map, applied as two matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from tove_jax.adapters.initializers import kaiming_relu


class Lora(NamedTuple):
    """Weights of E low-rank maps of rank r.

    Attributes:
      a_kernel: (d_in, E, r).
      b_kernel: (E, r, d_out).
      a_bias: (E, r), or None.
      b_bias: (E, d_out), or None.
      magnitude: (E, d_out), DoRA's magnitudes less the norms of the base's columns, or None.
    """

    a_kernel: jax.Array
    b_kernel: jax.Array
    a_bias: jax.Array | None = None
    b_bias: jax.Array | None = None
    magnitude: jax.Array | None = None


class LoraWeights(nn.Module):
    """Holds the weights of E low-rank maps; A is kaiming-uniform for relu, biases and magnitudes are zero.

    Attributes:
      width: d_in.
      features: d_out.
      experts: E.
      rank: r of each.
      b_init: ``kaiming``, or ``zeros``, where the maps start as zero.
      bias: whether A and B have one.
      magnitude: whether each map has DoRA's magnitudes.
    """

    width: int
    features: int
    experts: int
    rank: int
    b_init: Literal["kaiming", "zeros"]
    bias: bool
    magnitude: bool = False

    @nn.compact
    def __call__(self) -> Lora:
        """Returns them, float32."""
        experts, rank, zeros = self.experts, self.rank, nn.initializers.zeros
        b_init = kaiming_relu(rank) if self.b_init == "kaiming" else zeros
        a_kernel = self.param("a_kernel", kaiming_relu(self.width), (self.width, experts, rank))
        b_kernel = self.param("b_kernel", b_init, (experts, rank, self.features))
        a_bias = self.param("a_bias", zeros, (experts, rank)) if self.bias else None
        b_bias = self.param("b_bias", zeros, (experts, self.features)) if self.bias else None
        magnitude = self.param("magnitude", zeros, (experts, self.features)) if self.magnitude else None
        return Lora(a_kernel, b_kernel, a_bias, b_bias, magnitude)


def join(groups: Sequence[Lora]) -> Lora:
    """Returns the maps of several groups as one, in order; either all have a bias or none."""
    if len(groups) == 1:
        return groups[0]
    axes = Lora(a_kernel=1, b_kernel=0, a_bias=0, b_bias=0, magnitude=0)
    parts = zip(*groups, strict=True)
    return Lora(*(None if p[0] is None else jnp.concatenate(p, axis=a) for p, a in zip(parts, axes, strict=True)))


def apply_lora(weights: Lora, z: jax.Array, gate: jax.Array, scale: float, dtype: Any) -> jax.Array:
    """Returns ``sum_e gate_e * scale * (B_e(A_e z + a_e) + b_e)``.

    All A side by side are one product, all B one below the other another; between them each map's
    block of the rank is multiplied by its gate.

    Args:
      weights: of E maps.
      z: (..., d_in).
      gate: (..., E).
      scale: LoRA's alpha / rank.
      dtype: compute dtype.

    Returns:
      (..., d_out).
    """
    width, experts, rank = weights.a_kernel.shape
    features = weights.b_kernel.shape[-1]
    gate = gate * scale
    z, gate, a_kernel, b_kernel, a_bias, b_bias = promote_dtype(z, gate, *weights[:4], dtype=dtype)
    hidden = z @ a_kernel.reshape(width, experts * rank)
    if a_bias is not None:
        hidden = hidden + a_bias.reshape(experts * rank)
    hidden = (hidden.reshape(*z.shape[:-1], experts, rank) * gate[..., None]).reshape(hidden.shape)
    b_kernel = b_kernel.reshape(experts * rank, features)
    if b_bias is not None:
        # The gate rides along as E more rows of the rank, whose B is the bias.
        hidden = jnp.concatenate([hidden, gate], axis=-1)
        b_kernel = jnp.concatenate([b_kernel, b_bias])
    return _product(hidden, b_kernel)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns ``x @ kernel``, (..., r) and (r, d_out).

    Its kernel's gradient is the product of x and the cotangent in that order. In the other one, JAX's own, XLA writes
    the cotangent once more, transposed, on processors: a quarter of HAWAII's step.
    """
    return x @ kernel


def _product_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _product_backward(kept: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rows = tuple(range(x.ndim - 1))
    return cotangent @ kernel.T, jax.lax.dot_general(x, cotangent, ((rows, rows), ((), ())))


_product.defvjp(_product_forward, _product_backward)


def dora_change(weights: Lora, kernel: jax.Array, scale: float) -> jax.Array:
    """Returns m_e / ||W + scale A_e B_e|| - 1 (E, d_out), norms over the input: DoRA's rescaling of the columns.

    DoRA (Liu et al., arXiv 2402.09353) trains a magnitude for each column of the merged weight, and
    takes no gradient through the norm (its section 4.3). Here every expert has magnitudes of its own,
    m_e = ||W|| + `Lora.magnitude`, so that fresh experts fit any base (ours). The merged weights
    are never formed:

        ||W + scale A B||^2 = ||W||^2 + 2 scale sum_r B_r (A^T W)_r + scale^2 sum_r B_r (A^T A B)_r

    Args:
      weights: of E maps, with magnitudes.
      kernel: W (d_in, d_out).
      scale: LoRA's alpha / rank.
    """
    precise = jnp.promote_types(weights.a_kernel.dtype, jnp.float32)
    a, b, w = (jax.lax.stop_gradient(x.astype(precise)) for x in (weights.a_kernel, weights.b_kernel, kernel))
    base = jnp.square(w).sum(axis=0)
    inner = 2 * jnp.einsum("der,df->erf", a, w) + scale * jnp.einsum("der,des,esf->erf", a, a, b)
    merged = base + scale * (b * inner).sum(axis=1)
    norm = jnp.sqrt(jnp.maximum(merged, jnp.finfo(precise).tiny))
    # The difference first, so that fresh experts change nothing exactly.
    return (weights.magnitude.astype(precise) + (jnp.sqrt(base) - norm)) / norm


class AdapterFactory:
    """Builds equal adapters; hashable and comparable, so that modules holding it cache in jit."""

    def __init__(self, kind: Callable[..., nn.Module], fields: dict[str, Any]):
        self.kind, self.fields = kind, tuple(fields.items())

    def __call__(self, **more: Any) -> nn.Module:
        """Returns an adapter with these fields; ``name`` and ``parent`` may be given."""
        return self.kind(**dict(self.fields), **more)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterFactory) and (self.kind, self.fields) == (other.kind, other.fields)

    def __hash__(self) -> int:
        return hash((self.kind, self.fields))
