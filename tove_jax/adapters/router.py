"""Routers: which expert a token goes to, with what probability, and what is told of it."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from tove_jax.adapters.initializers import torch_linear

KINDS = ("probs", "choice", "probs_mean", "choice_mean", "entropy")


class Router(nn.Module):
    """One Linear and a softmax, initialised as ``torch.nn.Linear``.

    Attributes:
      experts: E.
      dtype: dtype of the product's operands; logits and softmax are float32 at the least.
    """

    experts: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns probabilities (..., E) for tokens (..., D)."""
        width = x.shape[-1]
        kernel = self.param("kernel", torch_linear(width), (width, self.experts))
        bias = self.param("bias", torch_linear(width), (self.experts,))
        precise = jnp.promote_types(self.dtype, jnp.float32)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        logits = jnp.matmul(x, kernel, preferred_element_type=precise) + bias.astype(precise)
        return jax.nn.softmax(logits, axis=-1)


class MlpRouter(nn.Module):
    """Linear, exact GELU, Linear, softmax: ``hidden/{kernel,bias}`` and ``out/{kernel,bias}``.

    Attributes:
      experts: E.
      width: hidden width.
      dtype: as `Router`'s.
    """

    experts: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns probabilities (..., E) for tokens (..., D)."""
        init = torch_linear(x.shape[-1])
        hidden = nn.Dense(self.width, dtype=self.dtype, kernel_init=init, bias_init=init, name="hidden")(x)
        return Router(self.experts, self.dtype, name="out")(nn.gelu(hidden, approximate=False))


def choose(probs: jax.Array) -> jax.Array:
    """Returns the one-hot of the likeliest expert, in the dtype of the probabilities; it has no gradient."""
    return jax.nn.one_hot(jnp.argmax(probs, axis=-1), probs.shape[-1], dtype=probs.dtype)


def top1_gate(probs: jax.Array, choice: jax.Array, gradient: Literal["none", "straight_through"]) -> jax.Array:
    """Returns the weight of each expert under top-1 routing: the choice.

    With ``straight_through`` it is multiplied by ``1 + (P - stop_gradient(P))``, which is one exactly
    but lets the loss reach the router.
    """
    if gradient == "straight_through":
        # The difference first, so that the factor is one exactly.
        return choice * (1 + (probs - jax.lax.stop_gradient(probs)))
    return choice


def report(prefix: str, probs: jax.Array, choice: jax.Array, wanted: frozenset[str]) -> dict[str, jax.Array]:
    """Returns what is wanted of one router, each of `KINDS` after the prefix.

    ``probs`` and ``choice`` are (B, T, E); ``probs_mean`` and ``choice_mean`` (B, E) are their means
    over tokens, ``entropy`` (B,) the mean entropy in nats.
    """
    found = {
        "probs": lambda: probs,
        "choice": lambda: choice,
        "probs_mean": lambda: probs.mean(axis=-2),
        "choice_mean": lambda: choice.mean(axis=-2),
        "entropy": lambda: jax.scipy.special.entr(probs).sum(axis=-1).mean(axis=-1),
    }
    return {prefix + kind: make() for kind, make in found.items() if prefix + kind in wanted}
