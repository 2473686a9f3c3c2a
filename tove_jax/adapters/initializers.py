"""Initialisers that follow PyTorch's conventions, which the released weights were drawn with."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


def uniform(bound: float) -> Initializer:
    """Returns an initialiser drawing from U(-bound, bound)."""

    def init(rng: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


def torch_linear(fan_in: int) -> Initializer:
    """Returns the default of ``torch.nn.Linear``, the same for weight and bias: U(+-1/sqrt(fan_in))."""
    return uniform(1.0 / math.sqrt(fan_in))


def kaiming_relu(fan_in: int) -> Initializer:
    """Returns kaiming-uniform for relu: U(+-sqrt(6/fan_in))."""
    return uniform(math.sqrt(6.0 / fan_in))
