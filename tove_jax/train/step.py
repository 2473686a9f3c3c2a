"""The one train step: a pure function of state and batch, for every method and mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tove_jax.config.schema import Config
from tove_jax.parallel import together
from tove_jax.parallel.overlap import compiler_options
from tove_jax.parallel.sharding import batch_sharding, replicated
from tove_jax.train.optimizer import global_norm, make_schedule
from tove_jax.train.state import TrainState, merge

Batch = dict[str, Any]
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
Prepare = Callable[[Any, Batch], Batch]


def make_step(
    config: Config,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    prepare: Prepare | None = None,
    weigh: Callable[[Batch], Batch] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the step; the caller jits it with shardings and donates the state.

    Gradients are taken of the trainable tree alone, so the frozen weights cost no gradient, no
    optimiser slot and no share of the clipped norm. Micro-batches are scanned and weighted by their
    number of real rows, which makes accumulation exact for losses that are means over rows.

    Args:
      config: seed, accumulation and schedule are read.
      loss: ``(params, batch, key) -> (mean over real rows, metrics)``.
      optimizer: over the flat trainable tree.
      prepare: ``(experts, batch) -> batch``, run on each micro-batch before anything is differentiated: the experts
        that run in the step, see `tove_jax.experts.online`.
      weigh: ``batch -> batch``, run on the whole batch before it is split: for losses that are means over something
        else than rows.

    Returns:
      ``step(state, batch, experts=None) -> (state, metrics)``; `experts` are what `prepare` takes, metrics are
      float32 scalars on the device.
    """
    pieces = config.train.accumulation
    schedule = make_schedule(config.optim, config.train.steps)

    def gradients(state: TrainState, experts: Any, batch: Batch, key: jax.Array) -> Any:
        with jax.named_scope("experts"):
            batch = batch if prepare is None else prepare(experts, batch)

        def of_trainable(trainable: Any) -> Any:
            return loss(merge(trainable, state.frozen), batch, key)

        (_, metrics), grads = jax.value_and_grad(of_trainable, has_aux=True)(state.trainable)
        return metrics, grads

    def accumulated(state: TrainState, experts: Any, batch: Batch, key: jax.Array) -> Any:
        # Split the rows with the pieces as the inner axis: each device keeps its own rows.
        micro = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)
        weights = micro["mask"].reshape(pieces, -1).sum(1).astype(jnp.float32)
        weights = weights / jnp.maximum(weights.sum(), 1.0)

        def piece(total: Any, item: Any) -> Any:
            part, weight, index = item
            result = gradients(state, experts, part, jax.random.fold_in(key, index))
            return jax.tree.map(lambda t, r: t + weight.astype(t.dtype) * r, total, result), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(gradients, state, experts, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(piece, zeros, (micro, weights, jnp.arange(pieces)))
        return total

    def step(state: TrainState, batch: Batch, experts: Any = None) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        batch = batch if weigh is None else weigh(batch)
        metrics, grads = (gradients if pieces == 1 else accumulated)(state, experts, batch, key)
        norm = global_norm(grads)
        good = jnp.isfinite(metrics["loss/total"]) & jnp.isfinite(norm) & (state.bad_step < 0)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        with jax.named_scope("optimiser"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
            trainable = keep(optax.apply_updates(state.trainable, updates), state.trainable)
        metrics = {
            **metrics,
            "optim/gradient_norm": norm,
            "optim/parameter_norm": global_norm(state.trainable),
            "optim/lr": jnp.asarray(schedule(state.step), jnp.float32),
        }
        new_state = TrainState(
            step=state.step + jnp.where(good, 1, 0),
            trainable=trainable,
            frozen=state.frozen,
            opt_state=keep(opt_state, state.opt_state),
            bad_step=jnp.where(good | (state.bad_step >= 0), state.bad_step, state.step),
        )
        return new_state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return step


def jit_step(
    step: Callable[..., Any], state: TrainState, experts: Any, mesh: Mesh, *, overlap: bool
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Jits a step over a mesh; the state is donated, rows are split, metrics are whole on every device.

    Of several processes, none begins its first step before all have compiled it.

    Args:
      step: of `make_step`.
      state: shardings of the state.
      experts: shardings of the experts' parameters.
      mesh: the device mesh.
      overlap: ask the compiler to let the network work beside the chips, see `tove_jax.parallel.overlap`.
    """
    jitted = jax.jit(
        step,
        donate_argnums=0,
        compiler_options=(compiler_options(mesh) if overlap else None) or None,
        in_shardings=(state, batch_sharding(mesh), experts),
        out_shardings=(state, replicated(mesh)),
    )
    return together.after_all_compiled(jitted)
