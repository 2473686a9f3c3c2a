"""What a training step carries: trainable and frozen parameters apart, and the optimiser's state.

Both parameter trees are flat, ``{"student/layers/mlp/fc1/kernel": array}``, so that one rule engine
serves groups, storage types and sharding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from tove_jax.config.schema import OptimConfig
from tove_jax.errors import InputError
from tove_jax.parallel import first_match

Flat = dict[str, Any]


class TrainState(NamedTuple):
    """The donated carry of the step.

    Attributes:
      step: int32 scalar, optimiser steps taken.
      trainable: float32 masters of what trains.
      frozen: what does not, in compute dtype; never changes.
      opt_state: optax state over `trainable` alone.
      bad_step: int32 scalar, the first step whose loss or gradient was not finite, else -1. From
        then on nothing is updated, so the state is the one that met it.
    """

    step: jax.Array
    trainable: Flat
    frozen: Flat
    opt_state: Any
    bad_step: jax.Array


def flatten(tree: Any) -> Flat:
    """Returns a nested dict as ``{"a/b": leaf}``."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Flat) -> Any:
    """Inverts `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def parameter_factors(config: OptimConfig, paths: Any) -> dict[str, float | None]:
    """Returns each parameter's learning-rate factor, None where it is frozen.

    Args:
      config: its ``groups`` are the rules.
      paths: every parameter's path.

    Raises:
      InputError: an uncovered parameter, a factor that is not a number or None, nothing trainable.
    """
    for pattern, factor in config.groups:
        if factor is not None and (isinstance(factor, bool) or not isinstance(factor, (int, float))):
            raise InputError(f"config.optim.groups: {pattern!r}: expected a number or None, found {factor!r}")
    factors = first_match(config.groups, paths, "config.optim.groups")
    if all(factor is None for factor in factors.values()):
        raise InputError("config.optim.groups: every parameter is frozen, there is nothing to train")
    return factors


def split(params: Any, factors: dict[str, float | None], dtype: Any) -> tuple[Flat, Flat]:
    """Splits a nested tree into float32 trainable masters and frozen leaves in compute dtype."""
    flat = flatten(params)
    trainable = {p: jnp.asarray(x, jnp.float32) for p, x in flat.items() if factors[p] is not None}
    frozen = {p: jnp.asarray(x, dtype) for p, x in flat.items() if factors[p] is None}
    return trainable, frozen


def merge(trainable: Flat, frozen: Flat) -> Any:
    """Returns the nested tree the modules take."""
    return unflatten({**frozen, **trainable})
