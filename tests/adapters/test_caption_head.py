"""The caption head: its formula in double precision, masks, and that it learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tove_jax.adapters.caption_head import CaptionHead, word_loss


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_head_by_its_formula():
    generator = np.random.default_rng(0)
    tokens = generator.standard_normal((2, 5, 4)) * 3 + 1
    params = {
        "query": generator.standard_normal(4),
        "norm": {"scale": generator.standard_normal(4), "bias": generator.standard_normal(4)},
        "out": {"kernel": generator.standard_normal((4, 7)), "bias": generator.standard_normal(7)},
    }
    x = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    weights = softmax(x @ params["query"] / 2)
    expected = np.einsum("bn,bnd->bd", weights, x) @ params["out"]["kernel"] + params["out"]["bias"]
    with jax.enable_x64(True):
        np.testing.assert_allclose(CaptionHead(7).apply({"params": params}, tokens), expected, atol=1e-10)
        shuffled = CaptionHead(7).apply({"params": params}, tokens[:, ::-1])
        np.testing.assert_allclose(shuffled, expected, atol=1e-10)


def test_word_loss_is_a_mean_over_the_captions_words():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((3, 6)), jnp.float32)
    captions = jnp.array([[2, 5, 0], [1, 0, 0], [4, 4, 4]])
    mask = jnp.array([[True, True, False], [True, False, False], [False, False, False]])
    losses, told = word_loss(logits, captions, mask)
    log = np.log(softmax(np.asarray(logits, np.float64)))
    np.testing.assert_allclose(losses, [-(log[0, 2] + log[0, 5]) / 2, -log[1, 1], 0], rtol=1e-5)
    np.testing.assert_array_equal(told, [True, True, False])
    slope = jax.grad(lambda z: word_loss(z, captions, mask)[0].sum())(logits)
    np.testing.assert_array_equal(slope[2], 0)
    assert np.abs(slope[:2]).min() > 0


def test_head_learns_words_that_the_tokens_hold():
    generator = np.random.default_rng(2)
    word = generator.integers(0, 5, 64)
    tokens = 0.3 * generator.standard_normal((64, 6, 8))
    # One token of six shows the word, and its last channel says so; the query has to find it.
    place = generator.integers(0, 6, 64)
    tokens[np.arange(64), place, word] += 4
    tokens[np.arange(64), place, 7] += 4
    tokens, captions = jnp.asarray(tokens, jnp.float32), jnp.asarray(word[:, None])
    params = CaptionHead(5).init(jax.random.key(0), tokens)["params"]
    optimizer = optax.adam(0.05)

    def loss(params):
        return word_loss(CaptionHead(5).apply({"params": params}, tokens), captions, captions >= 0)[0].mean()

    @jax.jit
    def fit(params):
        def step(carry, _):
            params, state = carry
            value, slope = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(slope, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, 100)[1]

    values = np.asarray(fit(params))
    assert values[0] > 1.2 and values[-1] < 0.1
