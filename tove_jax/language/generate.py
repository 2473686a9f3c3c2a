"""Continues prompts with a language model, and ranks given answers by likelihood."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.errors import InputError
from tove_jax.language.decode import Decoding, Generated, decode
from tove_jax.models.llama import Llama
from tove_jax.models.roberta import Roberta

Decoder = Llama | Roberta
"""What can continue prompts."""


def pad_rows(
    rows: Sequence[Sequence[int]], *, pad: int = 0, side: Literal["left", "right"] = "left", multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Brings rows of token ids to one length.

    Args:
      rows: token ids.
      pad: token id of the padding.
      side: where it goes; `generate` wants the left.
      multiple: the length is rounded up to this, so that few lengths are compiled.

    Returns:
      int32 (B, T) and bool (B, T), False for padding.

    Raises:
      InputError: no rows, or an empty one.
    """
    if not rows or not all(len(row) for row in rows):
        raise InputError("prompts: expected at least one, and at least one token in each")
    longest = max(map(len, rows))
    length = -(-longest // multiple) * multiple
    tokens = np.full((len(rows), length), pad, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(len(row))
        tokens[number, place] = row
        mask[number, place] = True
    return tokens, mask


def generate(
    module: Decoder,
    params: Any,
    tokens: Any = None,
    *,
    decoding: Decoding,
    embeddings: Any = None,
    mask: Any = None,
    pictures: Any = None,
    pictures_mask: Any = None,
    lora: Any = None,
    key: jax.Array | None = None,
) -> Generated:
    """Continues prompts; one compilation for each shape and setting.

    The cache has room for the prompt and `Decoding.new_tokens`; beams repeat it after the prompt was read once.

    Args:
      module: the language model.
      params: its tree.
      tokens: int (B, T), padded on the left (see `pad_rows`); or
      embeddings: (B, T, D), in place of tokens.
      decoding: the settings.
      mask: bool (B, T), False for padding; None: there is none.
      pictures: (B, M, Dv), picture tokens that a `Roberta` looks at; or None.
      pictures_mask: bool (B, M), see `Roberta`.
      lora: low-rank updates of a `Llama`, see `Llama`; or None.
      key: of sampling; the same key gives the same tokens.

    Returns:
      The tokens written, without the prompt.

    Raises:
      InputError: token ids beyond the vocabulary, a prompt padded on the right, sampling without a key.
    """
    inputs = _inputs(module, tokens, embeddings, mask, pictures, pictures_mask)
    for end in decoding.ends:
        if not 0 <= end < module.vocabulary:
            raise InputError(f"decoding: ends: token {end} is beyond the vocabulary of {module.vocabulary}")
    if decoding.sample and key is None:
        raise InputError("decoding: sampling needs a random key")
    return _generate(module, _variables(params, lora), inputs, decoding, key)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generate(
    module: Decoder, variables: Any, inputs: dict[str, jax.Array], decoding: Decoding, key: jax.Array | None
) -> Generated:
    logits, cache = _read(module, variables, inputs, decoding.new_tokens)

    def step(cache: Any, last: jax.Array) -> tuple[jax.Array, Any]:
        result: Any = module.apply(variables, last[:, None], cache=cache)
        return result[0][:, 0], result[1]["cache"]

    return decode(step, cache, logits, decoding, key)


def _read(module: Decoder, variables: Any, inputs: dict[str, Any], room: int) -> tuple[jax.Array, Any]:
    """Reads prompts; returns the logits after each, (B, V), and the cache with room for more tokens."""
    rows, length = inputs["mask"].shape
    cache = module.make_cache(rows, length + room)
    inputs = {**inputs, "cache": cache, "at": jnp.full((rows, 1), length - 1)}
    result: Any = module.apply(variables, **inputs)
    return result[0][:, 0], result[1]["cache"]


def rank(
    module: Decoder,
    params: Any,
    answers: Any,
    answers_mask: Any,
    tokens: Any = None,
    *,
    embeddings: Any = None,
    mask: Any = None,
    pictures: Any = None,
    pictures_mask: Any = None,
    lora: Any = None,
    mean: bool = False,
    chunk: int = 0,
) -> jax.Array:
    """Tells how likely each given answer is after its prompt; the prompt is read once for all its answers.

    Args:
      module: the language model.
      params: its tree.
      answers: int (B, A, T), token ids padded on the right; or (A, T), the same for every prompt.
      answers_mask: bool, of that shape, False for padding.
      tokens, embeddings, mask, pictures, pictures_mask, lora: the prompts, see `generate`.
      mean: per token, so that long answers are not at a disadvantage.
      chunk: answers of a prompt that are read at once, for long lists; 0: all. Each has a copy of its prompt's keys
        and values, and logits over the vocabulary.

    Returns:
      float32 (B, A), log-likelihoods, natural logarithm; the greatest is the likeliest.

    Raises:
      InputError: as `generate`; an answer without a token, or padded on the left.
    """
    inputs = _inputs(module, tokens, embeddings, mask, pictures, pictures_mask)
    answers, answers_mask = np.asarray(answers), np.asarray(answers_mask, bool)
    if answers.ndim == 2 and answers.shape == answers_mask.shape:
        answers, answers_mask = (
            np.broadcast_to(a, (inputs["mask"].shape[0], *a.shape)) for a in (answers, answers_mask)
        )
    if answers.ndim != 3 or answers.shape != answers_mask.shape or len(answers) != inputs["mask"].shape[0]:
        raise InputError(f"answers: expected (prompts, answers, tokens) and such a mask, found {answers.shape}")
    if not answers_mask[..., 0].all() or (answers_mask[..., 1:] & ~answers_mask[..., :-1]).any():
        raise InputError("answers: expected at least one token in each, and padding on the right")
    _check_ids(module, answers, "answers")
    return _rank(module, _variables(params, lora), inputs, jnp.asarray(answers), jnp.asarray(answers_mask), mean, chunk)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _rank(
    module: Decoder,
    variables: Any,
    inputs: dict[str, jax.Array],
    answers: jax.Array,
    mask: jax.Array,
    mean: bool,
    chunk: int,
) -> jax.Array:
    rows, count, length = answers.shape
    first, cache = _read(module, variables, inputs, length - 1)

    def score(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Returns (B, A) of some answers and their mask (B, A, T)."""
        answers, mask = (array.reshape(-1, length) for array in part)
        owner = jnp.repeat(jnp.arange(rows), part[0].shape[1])
        logits = first[owner][:, None]
        if length > 1:
            result: Any = module.apply(variables, answers[:, :-1], mask=mask[:, :-1], cache=cache.take(owner))
            logits = jnp.concatenate([logits, result[0]], axis=1)
        told = jnp.take_along_axis(logits, answers[..., None], axis=-1)[..., 0]
        told -= jax.nn.logsumexp(logits, axis=-1)
        total = jnp.where(mask, told, 0.0).sum(axis=1)
        return (total / mask.sum(axis=1) if mean else total).reshape(rows, -1)

    if not 0 < chunk < count:
        return score((answers, mask))
    spare = -count % chunk
    # Spare answers are copies of the first, so that none is empty.
    parts = (jnp.concatenate([array, jnp.repeat(array[:, :1], spare, axis=1)], axis=1) for array in (answers, mask))
    stacked = tuple(jnp.moveaxis(part.reshape(rows, -1, chunk, length), 1, 0) for part in parts)
    return jnp.moveaxis(jax.lax.map(score, stacked), 0, 1).reshape(rows, -1)[:, :count]


def _variables(params: Any, lora: Any) -> dict[str, Any]:
    return {"params": params} if lora is None else {"params": params, "lora": lora}


def _inputs(
    module: Decoder, tokens: Any, embeddings: Any, mask: Any, pictures: Any, pictures_mask: Any
) -> dict[str, jax.Array]:
    if (tokens is None) == (embeddings is None):
        raise InputError("prompts: expected either tokens or embeddings")
    given = tokens if embeddings is None else embeddings
    if np.ndim(given) != (2 if embeddings is None else 3):
        raise InputError(f"prompts: expected tokens (B, T) or embeddings (B, T, D), found {np.shape(given)}")
    if mask is None:
        mask = np.ones(np.shape(given)[:2], bool)
    mask = np.asarray(mask, bool)
    if mask.shape != np.shape(given)[:2]:
        raise InputError(f"prompts: mask: expected {np.shape(given)[:2]}, found {mask.shape}")
    if not mask[:, -1].all():
        raise InputError("prompts: expected padding on the left, found some at the end of a row")
    inputs = {"mask": jnp.asarray(mask)}
    if embeddings is None:
        _check_ids(module, np.asarray(tokens), "prompts")
        inputs["tokens"] = jnp.asarray(tokens, jnp.int32)
    else:
        inputs["embeddings"] = jnp.asarray(embeddings)
    if pictures is not None or pictures_mask is not None:
        if not isinstance(module, Roberta) or pictures is None:
            raise InputError("prompts: pictures: expected a language model with cross-attention, and tokens for it")
        inputs["pictures"] = jnp.asarray(pictures)
        if pictures_mask is not None:
            inputs["pictures_mask"] = jnp.asarray(pictures_mask, bool)
    return inputs


def _check_ids(module: Decoder, tokens: np.ndarray, what: str) -> None:
    if not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"{what}: expected integers, found {tokens.dtype}")
    least, most = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if least < 0 or most >= module.vocabulary:
        raise InputError(
            f"{what}: token {least if least < 0 else most} is beyond the vocabulary of {module.vocabulary}"
        )
