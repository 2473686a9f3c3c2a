"""Gate, projector and losses of the gate, against double-precision restatements and by their properties."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.adapters import token_gate
from tove_jax.adapters.token_gate import ExpertLayer, TokenGate

ERF = np.vectorize(math.erf)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_only_attached_columns_are_computed():
    with jax.enable_x64(True):
        tokens, kernel, bias = draw(0, 2, 5, 4), draw(1, 4, 3), draw(2, 3)
        params = {"params": {"kernel": kernel, "bias": bias}}
        full = TokenGate(3).apply(params, tokens, (0, 1, 2))
        np.testing.assert_allclose(full, tokens @ kernel + bias, atol=1e-12)
        np.testing.assert_array_equal(TokenGate(3).apply(params, tokens, (0, 2)), full[..., [0, 2]])
    uniform = TokenGate(3).init(jax.random.key(0), jnp.ones((1, 1, 4)), (0,))["params"]
    assert uniform["kernel"].shape == (4, 3) and not uniform["kernel"].any()
    assert TokenGate(3, "linear").init(jax.random.key(0), jnp.ones((1, 1, 4)), (0,))["params"]["kernel"].all()


def test_gate_logits_are_float32_of_bfloat16_tokens():
    tokens = jnp.asarray(draw(0, 2, 5, 4), jnp.bfloat16)
    params = {"params": {"kernel": jnp.asarray(draw(1, 4, 3), jnp.float32), "bias": jnp.zeros(3)}}
    assert TokenGate(3).apply(params, tokens, (0, 1)).dtype == jnp.float32


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_first_layer_by_its_formula(norm):
    with jax.enable_x64(True):
        patches = draw(3, 2, 2, 3, 5)
        layer = ExpertLayer((2, 3), 7, norm)
        params = {"first": {"kernel": draw(4, 5, 7), "bias": draw(5, 7)}}
        x = patches.reshape(2, 6, 5)
        if norm == "layer":
            params["norm"] = {"scale": draw(6, 5), "bias": draw(7, 5)}
            spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = (x - x.mean(-1, keepdims=True)) / spread * params["norm"]["scale"] + params["norm"]["bias"]
        h = x @ params["first"]["kernel"] + params["first"]["bias"]
        expected = 0.5 * h * (1 + ERF(h / math.sqrt(2)))
        np.testing.assert_allclose(layer.apply({"params": params}, patches), expected, atol=1e-10)


def test_mixing_hidden_tokens_equals_mixing_projected_ones():
    """The shared second layer is linear and gates sum to one, so it may come after the sum."""
    with jax.enable_x64(True):
        hidden, gate = [draw(k, 2, 5, 6) for k in range(3)], softmax(draw(9, 2, 5, 3))
        kernel, bias = draw(10, 6, 4), draw(11, 4)
        second = token_gate.second_layer(6, 4, False)
        after = second.apply({"params": {"kernel": kernel, "bias": bias}}, token_gate.mix(jnp.asarray(gate), hidden))
        before = sum(gate[..., k, None] * (hidden[k] @ kernel + bias) for k in range(3))
        np.testing.assert_allclose(after, before, atol=1e-12)
    zero = token_gate.second_layer(6, 4, True).init(jax.random.key(0), jnp.ones((1, 6)))["params"]
    assert not zero["kernel"].any() and not zero["bias"].any()


def test_gates_are_exactly_zero_where_an_expert_is_dropped():
    logits = jnp.asarray(draw(0, 2, 5, 3), jnp.float32)
    keep = jnp.array([[True, False, True], [True, True, True]])
    gate = token_gate.gate_weights(logits, keep)
    np.testing.assert_array_equal(gate[0, :, 1], 0)
    np.testing.assert_allclose(gate.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(gate[0][:, [0, 2]], token_gate.gate_weights(logits[0][:, [0, 2]]))
    slope = jax.grad(lambda z: token_gate.gate_weights(z, keep)[0, 0, 0])(logits)
    assert np.isfinite(slope).all() and slope[0, 0, 1] == 0 and slope[0, 0, 2] != 0


def test_random_drops_keep_one_and_have_the_asked_rate():
    keep = np.asarray(token_gate.random_keep(jax.random.key(0), 4000, 3, 0.5))
    assert keep.any(axis=1).all()
    # One of three always stays: 1/3 + 2/3 * 1/2.
    np.testing.assert_allclose(keep.mean(), 2 / 3, atol=0.02)
    np.testing.assert_allclose(keep.mean(0), keep.mean(), atol=0.03)
    assert token_gate.random_keep(jax.random.key(0), 50, 3, 1.0).sum(-1).max() == 1
    assert token_gate.random_keep(jax.random.key(0), 50, 3, 0.0).all()


def test_importance_loss():
    rows = jnp.array([True, True, False])
    gate = jnp.asarray(softmax(draw(0, 3, 5, 4)), jnp.float32).at[2].set(jnp.nan)
    total = np.asarray(gate[:2], np.float64).sum((0, 1))
    np.testing.assert_allclose(token_gate.importance_loss(gate, rows), (total.std() / total.mean()) ** 2, rtol=1e-5)
    assert float(token_gate.importance_loss(gate, rows & False)) == 0
    slope = jax.grad(lambda g: token_gate.importance_loss(g, rows & False))(jnp.ones((3, 5, 4)))
    assert np.isfinite(slope).all()


def test_load_probability_by_drawing_again():
    """The chance to be largest, against 20,000 draws of one expert's own noise."""
    clean, deviation = jnp.array([[[0.3, 0.0, -0.2]]]), 1 / 3
    noisy = clean + jnp.array([[[0.1, 0.2, -0.3]]])
    found = np.asarray(token_gate.load_probability(clean, noisy, deviation))[0, 0]
    generator = np.random.default_rng(0)
    for k in range(3):
        others = max(float(noisy[0, 0, j]) for j in range(3) if j != k)
        again = float(clean[0, 0, k]) + deviation * generator.standard_normal(20_000)
        np.testing.assert_allclose(found[k], (again > others).mean(), atol=0.015)
    np.testing.assert_array_equal(token_gate.load_probability(clean[..., :1], noisy[..., :1], 1.0), 1)
