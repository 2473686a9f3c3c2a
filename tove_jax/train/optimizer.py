"""AdamW over the trainable tree, with a learning-rate factor a group, and its schedules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from tove_jax.config.schema import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then cosine, linear or constant.

    Args:
      config: peak, shape and share of warm-up.
      steps: optimiser steps of the run.
    """
    warmup = round(config.warmup * steps)
    after = max(1, steps - warmup)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(config.lr, after)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(config.lr, 0.0, after)
    else:
        decay = optax.constant_schedule(config.lr)
    if not warmup:
        return decay
    # From lr / warmup rather than from zero, so that the first step is not lost.
    return optax.join_schedules([optax.linear_schedule(config.lr / warmup, config.lr, warmup - 1), decay], [warmup])


def make_optimizer(config: OptimConfig, steps: int, factors: dict[str, float | None]) -> optax.GradientTransformation:
    """Returns AdamW for a flat trainable tree.

    Args:
      config: AdamW's settings; decay falls on leaves whose path ends in ``kernel`` or ``embed``.
      steps: optimiser steps of the run.
      factors: learning-rate factor a path; None entries own no slot.
    """

    def decayed(params: Any) -> Any:
        return {path: path.endswith(("kernel", "_embed")) for path in params}

    def by_group(updates: Any, params: Any = None) -> Any:
        del params
        return {path: update * jnp.asarray(factors[path], update.dtype) for path, update in updates.items()}

    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts += [
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.stateless(by_group),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    ]
    return optax.chain(*parts)


def global_norm(tree: Any) -> jax.Array:
    """Returns the float32 norm of all leaves together."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
