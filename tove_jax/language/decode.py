"""Decoding with static shapes: greedy, sampling, beams. Knows a step function, no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from tove_jax.errors import InputError

NEVER = -1e9
"""Score of what must not be chosen; finite, so that differences of scores stay numbers."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How text is continued; hashable, so one compilation each.

    Attributes:
      new_tokens: tokens written at most, the end token among them.
      ends: token ids at which a row ends.
      pad: token id that follows the end.
      sample: draw tokens; otherwise the likeliest is taken.
      temperature: of sampling, divides the logits.
      top_k: draw among so many likeliest tokens; 0: among all.
      top_p: draw among the fewest likeliest tokens that hold this much probability.
      beams: width of beam search; 1: none.
      length_penalty: beam scores are divided by length to this power; above 0 favours long answers.
      early_stopping: True: a row is done once it has as many ended answers as beams; False: once its best open beam
        at its present length scores below them; ``never``: once it does at the most favourable length.
      min_tokens: tokens written at least before the end token may come.
    """

    new_tokens: int
    ends: tuple[int, ...] = ()
    pad: int = 0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        problems = {
            "new_tokens": self.new_tokens < 1,
            "temperature": not self.temperature > 0,
            "top_k": self.top_k < 0,
            "top_p": not 0 < self.top_p <= 1,
            "min_tokens": not 0 <= self.min_tokens <= self.new_tokens,
            "beams": self.beams < 1,
            "early_stopping": self.early_stopping not in (True, False, "never"),
        }
        for name, wrong in problems.items():
            if wrong:
                raise InputError(f"decoding: {name}: {getattr(self, name)!r} is out of range")
        if self.sample and self.beams > 1:
            raise InputError("decoding: sampling and beam search exclude each other")


class Generated(NamedTuple):
    """What was written.

    Attributes:
      tokens: int32 (B, new_tokens), `Decoding.pad` after the end.
      lengths: int32 (B,), tokens written, the end token among them.
      scores: float32 (B,), log-likelihood of the tokens written under the model (not under the filters of
        sampling); with beams, divided by the length penalty.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


class Rows(Protocol):
    """A cache whose rows can be chosen."""

    def take(self, rows: jax.Array) -> Any:
        """Returns the rows with the given numbers."""


State = TypeVar("State", bound=Rows)
Step = Callable[[Any, jax.Array], tuple[jax.Array, Any]]
"""``(cache, tokens int32 (N,)) -> (logits float32 (N, V) of the token after them, cache)``."""


def filter_logits(logits: jax.Array, decoding: Decoding) -> jax.Array:
    """Applies temperature, then top-k, then top-p (Holtzman et al., arXiv:1904.09751), as transformers orders them.

    Args:
      logits: float (..., V).
      decoding: the settings.

    Returns:
      The same shape; minus infinity for what must not be drawn. Of tokens equal to the last one kept, all stay.
    """
    logits = logits / decoding.temperature
    if 0 < decoding.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, decoding.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if decoding.top_p < 1:
        falling = jnp.sort(logits, axis=-1, descending=True)
        shares = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        kept = jnp.maximum((before < decoding.top_p).sum(axis=-1, keepdims=True), 1)
        least = jnp.take_along_axis(falling, kept - 1, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _is_end(tokens: jax.Array, decoding: Decoding) -> jax.Array:
    ended = jnp.zeros(tokens.shape, bool)
    for end in decoding.ends:
        ended |= tokens == end
    return ended


def forbid_ends(scores: jax.Array, number: jax.Array, decoding: Decoding) -> jax.Array:
    """Returns scores (..., V) of the next token, minus infinity for ends while `number` tokens are too few."""
    if not decoding.min_tokens or not decoding.ends:
        return scores
    ends = jnp.zeros(scores.shape[-1], bool).at[jnp.asarray(decoding.ends)].set(True)
    return jnp.where(ends & (number < decoding.min_tokens), -jnp.inf, scores)


def decode(step: Step, cache: Any, logits: jax.Array, decoding: Decoding, key: jax.Array | None = None) -> Generated:
    """Continues rows until all have ended or `new_tokens` are written; to be called inside jit.

    Args:
      step: see `Step`; its cache must have room for ``new_tokens - 1`` further tokens a row.
      cache: after the prompts; with beams it needs ``take`` (see `Rows`).
      logits: float (B, V), of the token after each prompt.
      decoding: the settings.
      key: of sampling.

    Raises:
      InputError: sampling without a key.
    """
    if decoding.beams > 1:
        return _beams(step, cache, logits, decoding)
    if decoding.sample and key is None:
        raise InputError("decoding: sampling needs a random key")
    return _single(step, cache, logits, decoding, key)


def _single(step: Step, cache: Any, logits: jax.Array, decoding: Decoding, key: jax.Array | None) -> Generated:
    rows, size = logits.shape[0], decoding.new_tokens
    tokens = jnp.full((rows, size), decoding.pad, jnp.int32)
    done = jnp.zeros(rows, bool)
    nothing = jnp.zeros(rows, jnp.float32)

    def choose(number: jax.Array, logits: jax.Array, tokens: Any, done: Any, scores: Any, lengths: Any) -> Any:
        logits = logits.astype(jnp.float32)
        allowed = forbid_ends(logits, number, decoding)
        if decoding.sample and key is not None:
            chosen = jax.random.categorical(jax.random.fold_in(key, number), filter_logits(allowed, decoding))
        else:
            chosen = jnp.argmax(allowed, axis=-1)
        chosen = chosen.astype(jnp.int32)
        told = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=1)[:, 0]
        scores = jnp.where(done, scores, scores + told)
        lengths = jnp.where(done, lengths, lengths + 1)
        chosen = jnp.where(done, decoding.pad, chosen)
        tokens = tokens.at[:, number].set(chosen)
        return chosen, tokens, done | _is_end(chosen, decoding), scores, lengths

    def more(state: Any) -> jax.Array:
        number, _, _, _, done, _, _ = state
        return (number < size) & ~done.all()

    def advance(state: Any) -> Any:
        number, cache, last, tokens, done, scores, lengths = state
        logits, cache = step(cache, last)
        last, tokens, done, scores, lengths = choose(number, logits, tokens, done, scores, lengths)
        return number + 1, cache, last, tokens, done, scores, lengths

    first = jnp.zeros((), jnp.int32)
    last, tokens, done, scores, lengths = choose(first, logits, tokens, done, nothing, nothing.astype(jnp.int32))
    state = (first + 1, cache, last, tokens, done, scores, lengths)
    _, _, _, tokens, _, scores, lengths = jax.lax.while_loop(more, advance, state)
    return Generated(tokens, lengths, scores)


class _Search(NamedTuple):
    """State of a beam search: open beams go on, kept ones have ended; the best come first.

    Attributes:
      number: tokens written.
      cache: of the open beams, rows B * beams.
      logits: (B * beams, V).
      tokens, scores: (B, beams, new_tokens) and sums of log-likelihoods (B, beams) of the open beams.
      kept, kept_scores, kept_lengths, full: the ended answers, divided by the length penalty; whether the place is
        taken.
      improving: (B,), whether an open beam may still beat the kept ones.
    """

    number: jax.Array
    cache: Any
    logits: jax.Array
    tokens: jax.Array
    scores: jax.Array
    kept: jax.Array
    kept_scores: jax.Array
    kept_lengths: jax.Array
    full: jax.Array
    improving: jax.Array


def _beams(step: Step, cache: Any, logits: jax.Array, decoding: Decoding) -> Generated:
    """Beam search; rules and numbers are those of transformers, so that answers are equal."""
    rows, vocabulary = logits.shape
    beams, size, penalty = decoding.beams, decoding.new_tokens, decoding.length_penalty
    # With so many candidates, enough go on even if every beam's best tokens are ends.
    wide = min(max(2, 1 + len(decoding.ends)) * beams, beams * vocabulary)
    owner = jnp.repeat(jnp.arange(rows), beams)
    blank = jnp.full((rows, beams, size), decoding.pad, jnp.int32)
    start = _Search(
        number=jnp.zeros((), jnp.int32),
        cache=cache.take(owner),
        logits=logits[owner].astype(jnp.float32),
        tokens=blank,
        # All beams are alike at first, so the first alone counts.
        scores=jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, NEVER), (rows, beams)),
        kept=blank,
        kept_scores=jnp.full((rows, beams), NEVER),
        kept_lengths=jnp.zeros((rows, beams), jnp.int32),
        full=jnp.zeros((rows, beams), bool),
        improving=jnp.ones(rows, bool),
    )

    def pick(array: jax.Array, places: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array, places.reshape(*places.shape, *(1,) * (array.ndim - 2)), axis=1)

    def choose(state: _Search) -> tuple[_Search, jax.Array, jax.Array]:
        """Extends every beam by a token; returns also the beams that go on and their last tokens."""
        length = state.number + 1
        told = jax.nn.log_softmax(state.logits, axis=-1).reshape(rows, beams, vocabulary)
        told = forbid_ends(told, state.number, decoding)
        total = (told + state.scores[..., None]).reshape(rows, beams * vocabulary)
        scores, places = jax.lax.top_k(total, wide)
        beam, token = places // vocabulary, (places % vocabulary).astype(jnp.int32)
        tokens = pick(state.tokens, beam).at[:, :, state.number].set(token)
        ended = _is_end(token, decoding) | (length == size)

        open_scores, on = jax.lax.top_k(jnp.where(ended, scores + NEVER, scores), beams)
        # Only ends among the best candidates count as answers; the others are there to go on.
        answers = ended & (jnp.arange(wide) < beams)
        stop = ~state.improving
        if decoding.early_stopping is True:
            stop |= state.full.all(axis=1)
        answers_scores = scores / length.astype(jnp.float32) ** penalty
        answers_scores = jnp.where(answers & ~stop[:, None], answers_scores, 2 * NEVER)
        both = jnp.concatenate([state.kept_scores, answers_scores], axis=1)
        kept_scores, best = jax.lax.top_k(both, beams)
        lengths = jnp.broadcast_to(length, (rows, wide))
        kept = pick(jnp.concatenate([state.kept, tokens], axis=1), best)
        kept_lengths = pick(jnp.concatenate([state.kept_lengths, lengths], axis=1), best)
        full = pick(jnp.concatenate([state.full, answers & ~stop[:, None]], axis=1), best)

        reach = size if decoding.early_stopping == "never" and penalty > 0 else length
        hope = open_scores[:, 0] / jnp.asarray(reach, jnp.float32) ** penalty
        worst = jnp.where(full, kept_scores.min(axis=1, keepdims=True), NEVER)
        improving = state.improving & (hope[:, None] > worst).any(axis=1)
        state = state._replace(
            number=length,
            tokens=pick(tokens, on),
            scores=open_scores,
            kept=kept,
            kept_scores=kept_scores,
            kept_lengths=kept_lengths,
            full=full,
            improving=improving,
        )
        return state, pick(beam, on), pick(token, on)

    def more(carry: tuple[_Search, jax.Array, jax.Array]) -> jax.Array:
        state = carry[0]
        going = (state.number < size) & state.improving.any()
        if decoding.early_stopping is True:
            going &= ~state.full.all()
        return going

    def advance(carry: tuple[_Search, jax.Array, jax.Array]) -> tuple[_Search, jax.Array, jax.Array]:
        state, beam, token = carry
        whence = (jnp.arange(rows)[:, None] * beams + beam).reshape(-1)
        logits, cache = step(state.cache.take(whence), token.reshape(-1))
        return choose(state._replace(cache=cache, logits=logits.astype(jnp.float32)))

    state, _, _ = jax.lax.while_loop(more, advance, choose(start))
    return Generated(state.kept[:, 0], state.kept_lengths[:, 0], state.kept_scores[:, 0])
