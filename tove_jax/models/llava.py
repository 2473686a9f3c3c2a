"""LLaVA: a vision tower, a projector and a language model that reads picture tokens between those of its text."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tove_jax.data.conversation import IMAGE_ID
from tove_jax.errors import InputError


def place_pictures(embeddings: jax.Array, input_ids: jax.Array, tokens: jax.Array) -> jax.Array:
    """Puts picture tokens where a row's ids have their placeholder.

    The k-th position of a row that holds `IMAGE_ID` takes the row's k-th picture token; tokens beyond a row's
    positions are left out, and a position beyond the row's tokens becomes NaN, so that the fault is seen.

    Args:
      embeddings: of the text, (B, T, W); at the positions of pictures anything, such as that of token 0.
      input_ids: int (B, T).
      tokens: (B, M, W), of each row's pictures in order; M may be 0.

    Returns:
      (B, T, W), in the dtype of `embeddings`.

    Raises:
      InputError: shapes that do not fit each other.
    """
    rows, length, width = embeddings.shape
    if input_ids.shape != (rows, length) or tokens.ndim != 3 or (tokens.shape[0], tokens.shape[2]) != (rows, width):
        raise InputError(
            f"pictures: expected embeddings (B, T, W), ids (B, T) and tokens (B, M, W), found {embeddings.shape}, "
            f"{input_ids.shape} and {tokens.shape}"
        )
    here = input_ids == IMAGE_ID
    if not tokens.shape[1]:
        return jnp.where(here[..., None], jnp.nan, embeddings)
    slots = jnp.cumsum(here, axis=1) - 1
    # Before the first picture the slot is -1; what it takes there is not used, yet must exist for its gradient's sake.
    taken = jnp.take_along_axis(tokens, jnp.maximum(slots, 0)[..., None], axis=1, mode="fill")
    return jnp.where(here[..., None], taken.astype(embeddings.dtype), embeddings)
