"""Where a model looked for an answer: what each picture token did to the answer's likelihood.

    L   = sum_t log p(answer_t | pictures, prompt, answer_<t)
    a_n = sum_d |dL/dv_nd  v_nd|

v_n is the n-th picture token as the decoder reads it: after the projector, or as cross-attention sees it. This is gradient
times input (Shrikumar et al., arXiv:1605.01713), absolute for each channel [choice of ours], so that what speaks for an
answer and what speaks against it both count. It says which tokens were read, not which pixels: a token also holds what the
encoder's own attention brought to its place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.data.conversation import IGNORED
from tove_jax.errors import InputError
from tove_jax.language.chat import Chat
from tove_jax.language.generate import pad_rows
from tove_jax.language.loss import next_tokens, token_losses
from tove_jax.language.model import LanguageModel
from tove_jax.models.llava import place_pictures

_ROWS = 4  # a call; the last one is filled up, so that one shape is compiled
_MULTIPLE = 32  # rows' lengths are rounded up to it


class Look(NamedTuple):
    """Where a model looked for one answer.

    Attributes:
      maps: float32 (side, side) of each picture, of its grid of tokens; all of a question's pictures together sum to one,
        or to zero where no token moves the answer.
      log_likelihood: of the answer and its end, natural logarithm.
    """

    maps: tuple[np.ndarray, ...]
    log_likelihood: float


def look(
    chat: Chat, pictures: Sequence[Sequence[np.ndarray]], prompts: Sequence[str], answers: Sequence[str]
) -> list[Look]:
    """Tells for each answer how much each picture token moved it.

    Args:
      chat: the model.
      pictures: of each prompt at least one, uint8 (H, W, 3).
      prompts: the user's turns, see `tove_jax.language.answer.Answerer`.
      answers: one each, the model's own or any other, not empty.

    Raises:
      InputError: as `Chat.rank`; lists of other lengths, a prompt without a picture, tokens that are no square grid.
    """
    if not len(pictures) == len(prompts) == len(answers):
        raise InputError(
            f"look: expected pictures and an answer for each of {len(prompts)} prompts, found {len(pictures)} and "
            f"{len(answers)}"
        )
    if not all(pictures):
        raise InputError("look: expected a picture with each prompt, found none")
    if not prompts:
        return []
    rows, first, seen = [], [], [chat.tokens(shown) for shown in pictures]
    for prompt, answer, tokens in zip(prompts, answers, seen, strict=True):
        before, (after, *_) = chat.divided(prompt, len(tokens), [answer])
        before = chat.placed(before, tokens)
        rows.append(np.concatenate([before, after]))
        first.append(len(before))
    longest = max(map(len, rows))
    if longest > chat.limit:
        raise InputError(f"look: expected at most {chat.limit} tokens with the answer, found {longest}")
    length = min(-(-longest // _MULTIPLE) * _MULTIPLE, chat.limit)
    ids, mask = pad_rows([row.tolist() for row in rows], pad=chat.tokenizer.pad, side="right", multiple=length)
    learned = mask & (np.arange(length) >= np.array(first)[:, None])
    most, width = max(sum(map(len, row)) for row in seen), seen[0][0].shape[-1]
    joined = np.zeros((len(rows), most, width), np.float32)
    there = np.zeros((len(rows), most), bool)
    for place, row in enumerate(seen):
        every = np.concatenate(row)
        joined[place, : len(every)], there[place, : len(every)] = every, True
    whole = (ids, np.where(learned, ids, IGNORED), joined, there)
    found = []
    for start in range(0, len(rows), _ROWS):
        part = np.minimum(np.arange(start, start + _ROWS), len(rows) - 1)
        amounts, told = _attribute(chat.model, chat.params, *(array[part] for array in whole))
        found += list(zip(np.asarray(amounts), np.asarray(told), strict=True))
    return [
        Look(_laid_out(amounts, row), float(told))
        for (amounts, told), row in zip(found[: len(rows)], seen, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _attribute(
    model: LanguageModel, params: Any, ids: jax.Array, labels: jax.Array, tokens: jax.Array, there: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns a_n (B, M) and L (B,) of rows that are padded on the right, where no token before looks."""
    variables = model.variables(params)

    def likelihood(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        if model.projector is None:
            inputs = {"tokens": jnp.maximum(ids, 0), "pictures": tokens, "pictures_mask": there}
        else:
            inputs = {"embeddings": place_pictures(model.embed(params, ids), ids, tokens)}
        result: Any = model.decoder.apply(variables, **inputs, intermediates=("hidden",), final=False)
        losses, _ = token_losses(
            result[1]["hidden"],
            next_tokens(labels),
            lambda hidden: model.decoder.apply(variables, hidden, method="logits"),
            chunk=model.config.loss_chunk,
        )
        rows = -losses.sum(axis=1)
        return rows.sum(), rows

    (_, told), gradient = jax.value_and_grad(likelihood, has_aux=True)(tokens)
    return jnp.abs(gradient * tokens).sum(axis=-1), told


def _laid_out(amounts: np.ndarray, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Divides a row's amounts (M,) among its pictures' grids, as shares of their sum."""
    counts = [len(tokens) for tokens in pictures]
    for count in counts:
        if math.isqrt(count) ** 2 != count:
            raise InputError(f"look: expected a picture's tokens to be a square grid, found {count} tokens")
    amounts = amounts[: sum(counts)].astype(np.float64)
    total = amounts.sum()
    shares = (amounts / total if total > 0 else amounts).astype(np.float32)
    parts = np.split(shares, np.cumsum(counts)[:-1])
    return tuple(part.reshape(math.isqrt(len(part)), -1) for part in parts)
