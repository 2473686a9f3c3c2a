"""The text loss: cross-entropy of the next token, in parts where a vocabulary is large."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tove_jax.data.conversation import IGNORED


def next_tokens(labels: jax.Array) -> jax.Array:
    """Returns what each position has to tell, int (B, T): the label after it, `IGNORED` for the last."""
    return jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], IGNORED)], axis=1)


def token_losses(
    hidden: jax.Array,
    targets: jax.Array,
    head: Callable[[jax.Array], jax.Array],
    *,
    smoothing: float = 0.0,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss of every position, and whether its likeliest token is the right one.

        loss = (1 - e) (-log p_target) + e mean_v (-log p_v)                        e: smoothing

    Args:
      hidden: (B, T, D), final hidden states.
      targets: int (B, T), `IGNORED` where nothing is learned.
      head: from (B, C, D) to logits (B, C, V), float32 at the least.
      smoothing: e, as torch's ``label_smoothing``.
      chunk: positions of a row whose logits are held at once, forwards and backwards; 0: all.

    Returns:
      float32 (B, T), zero where nothing is learned; bool (B, T), False there.
    """

    def part(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = head(hidden)
        learned = targets != IGNORED
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        wanted = jnp.where(learned, targets, 0)[..., None]
        losses = -jnp.take_along_axis(log_probs, wanted, axis=-1)[..., 0]
        if smoothing:
            losses = (1 - smoothing) * losses - smoothing * log_probs.mean(axis=-1)
        return jnp.where(learned, losses, 0.0), learned & (logits.argmax(axis=-1) == targets)

    batch, length, width = hidden.shape
    if not chunk or chunk >= length:
        return part(hidden, targets)
    more = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, more), (0, 0))).reshape(batch, -1, chunk, width).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, more)), constant_values=IGNORED).reshape(batch, -1, chunk).swapaxes(0, 1)
    found = jax.lax.map(lambda pair: jax.checkpoint(part)(*pair), (hidden, targets))
    losses, right = (array.swapaxes(0, 1).reshape(batch, -1)[:, :length] for array in found)
    return losses, right
