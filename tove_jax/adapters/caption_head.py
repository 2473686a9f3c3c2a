"""A small caption head: the words of a picture's caption, guessed from its tokens. Ours.

It stands where the language model's text loss will: tokens that hold more of what a caption says give
a lower loss, so its gradient teaches the gate and the projector.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.adapters.initializers import torch_linear

LOGICAL_AXES = (
    (r"(.*/)?caption_head/query", ("embed",)),
    (r"(.*/)?caption_head/norm/(scale|bias)", ("embed",)),
    (r"(.*/)?caption_head/out/kernel", ("embed", "vocab")),
    (r"(.*/)?caption_head/out/bias", ("vocab",)),
)


class CaptionHead(nn.Module):
    """One learnt query pools the tokens, one linear gives a logit a word.

        x = norm(T)     p = sum_i softmax_i(<q, x_i> / sqrt(d)) x_i     logits = W p + b

    Attributes:
      words: size of the vocabulary.
      dtype: compute dtype; the softmax and the logits are float32 at the least.
    """

    words: int
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps (B, N, D) to logits (B, words)."""
        width = tokens.shape[-1]
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="norm")(tokens)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        query = self.param("query", nn.initializers.normal(1.0), (width,)).astype(x.dtype)
        attention = jax.nn.softmax(jnp.einsum("bnd,d->bn", x, query) * width**-0.5, axis=-1)
        pooled = jnp.einsum("bn,bnd->bd", attention, x)
        init = torch_linear(width)
        return nn.Dense(self.words, kernel_init=init, bias_init=nn.initializers.zeros, name="out")(pooled)


def word_loss(logits: jax.Array, captions: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of one softmax over words against the caption's bag of words.

    Args:
      logits: (B, words).
      captions: int (B, L), numbers of the caption's words.
      mask: bool (B, L), which of them there are.

    Returns:
      (B,) mean of -log p over the caption's words, zero where it has none; and bool (B,), which
      captions have any.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    losses = -jnp.take_along_axis(log_probs, jnp.where(mask, captions, 0), axis=-1)
    count = mask.sum(axis=-1)
    return jnp.where(mask, losses, 0).sum(axis=-1) / jnp.maximum(count, 1), count > 0
