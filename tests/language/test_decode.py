"""Filters equal transformers'; decoding by a table of likelihoods does what its definition says."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.language.decode import Decoding, decode, filter_logits

LOGITS = np.random.RandomState(0).standard_normal((4, 9)).astype(np.float32) * 2


class Memory(tuple):
    """A cache of nothing: the last token is all that the step below looks at."""

    def take(self, rows):
        return self


jax.tree_util.register_pytree_node(Memory, lambda m: ((), None), lambda _, __: Memory())
TABLE = np.random.RandomState(5).standard_normal((9, 9)).astype(np.float32) * 1.5


def step(cache, tokens):
    return jnp.asarray(TABLE)[tokens], cache


def run(decoding, key=None, logits=LOGITS):
    return jax.jit(lambda logits, key: decode(step, Memory(), logits, decoding, key))(jnp.asarray(logits), key)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.6}, {"top_p": 0.01},
                                     {"temperature": 2.5, "top_k": 5, "top_p": 0.7}])  # fmt: skip
def test_filters_equal_transformers(options):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    decoding = Decoding(new_tokens=1, sample=True, **options)
    theirs = logits_process.TemperatureLogitsWarper(decoding.temperature)(None, torch.tensor(LOGITS))
    if decoding.top_k:
        theirs = logits_process.TopKLogitsWarper(decoding.top_k)(None, theirs)
    if decoding.top_p < 1:
        theirs = logits_process.TopPLogitsWarper(decoding.top_p)(None, theirs)
    np.testing.assert_allclose(filter_logits(jnp.asarray(LOGITS), decoding), theirs.numpy(), rtol=1e-6)


def test_filters_keep_what_they_say():
    kept = np.isfinite(filter_logits(jnp.asarray(LOGITS), Decoding(1, sample=True, top_k=3)))
    assert (kept.sum(1) == 3).all()
    shares = np.asarray(jax.nn.softmax(jnp.asarray(LOGITS)))
    kept = np.isfinite(filter_logits(jnp.asarray(LOGITS), Decoding(1, sample=True, top_p=0.6)))
    for share, keep in zip(shares, kept, strict=True):
        assert share[keep].sum() >= 0.6 > share[keep].sum() - share[keep].min()
        assert share[keep].min() > share[~keep].max()


def test_samples_follow_the_distribution_and_the_key():
    decoding = Decoding(2, sample=True, temperature=1.3, top_k=5, ends=(8,))
    many = np.repeat(LOGITS[:1], 20000, axis=0)
    first, again = run(decoding, jax.random.key(1), many), run(decoding, jax.random.key(1), many)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (np.asarray(first.tokens) != np.asarray(run(decoding, jax.random.key(2), many).tokens)).mean() > 0.3
    tokens = np.asarray(first.tokens)
    share = np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(LOGITS[0]), decoding)))
    np.testing.assert_allclose(np.bincount(tokens[:, 0], minlength=9) / len(tokens), share, atol=4 * 0.5 / 20000**0.5)
    favourite = share.argmax()
    after = tokens[tokens[:, 0] == favourite, 1]
    share = np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(TABLE[favourite]), decoding)))
    np.testing.assert_allclose(np.bincount(after, minlength=9) / len(after), share, atol=4 * 0.5 / len(after) ** 0.5)


def likelihood(first, answer):
    rows = [first, *TABLE[list(answer[:-1])]]
    return sum(
        np.log(np.exp(row[t] - row.max()) / np.exp(row - row.max()).sum()) for row, t in zip(rows, answer, strict=True)
    )


def test_greedy_is_sampling_without_heat_and_stops_at_the_end():
    greedy = run(Decoding(6, ends=(3, 4), pad=7))
    cold = run(Decoding(6, ends=(3, 4), pad=7, sample=True, temperature=1e-4), jax.random.key(0))
    np.testing.assert_array_equal(greedy.tokens, cold.tokens)
    for row, (tokens, length) in enumerate(zip(np.asarray(greedy.tokens), np.asarray(greedy.lengths), strict=True)):
        last = LOGITS[row]
        for number, token in enumerate(tokens[:length]):
            assert token == last.argmax()
            assert (token in (3, 4)) == (number == length - 1) or length == 6
            last = TABLE[token]
        assert (tokens[length:] == 7).all()
        np.testing.assert_allclose(greedy.scores[row], likelihood(LOGITS[row], tokens[:length]), rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_wide_beams_find_the_best_answer(penalty):
    """With every sequence in the beam, beam search is exhaustive search."""
    size, end = 3, 8
    decoding = Decoding(size, ends=(end,), beams=64, length_penalty=penalty, early_stopping="never")
    found = run(decoding, logits=LOGITS[:2])
    for row in range(2):
        answers = {
            answer[: answer.index(end) + 1] if end in answer else answer
            for answer in itertools.product(range(9), repeat=size)
        }
        scores = {answer: likelihood(LOGITS[row], answer) / len(answer) ** penalty for answer in answers}
        best = max(scores, key=scores.get)
        assert tuple(np.asarray(found.tokens)[row][: found.lengths[row]]) == best
        np.testing.assert_allclose(found.scores[row], scores[best], rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"new_tokens": 0}, {"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"beams": 0}, {"early_stopping": "maybe"},
     {"sample": True, "beams": 2}],
)  # fmt: skip
def test_bad_settings(options):
    with pytest.raises(InputError, match="decoding"):
        Decoding(**{"new_tokens": 3, **options})


def test_sampling_needs_a_key():
    with pytest.raises(InputError, match="key"):
        decode(step, Memory(), jnp.asarray(LOGITS), Decoding(2, sample=True))
