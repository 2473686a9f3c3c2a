from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.models.attention import attention, attention_row_scores, choose


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_equals_the_written_out_formula(dtype, tolerance):
    draw = np.random.default_rng(0)
    query, key, value = (jnp.asarray(draw.standard_normal((2, 7, 3, 8)), dtype) for _ in range(3))
    exact = [np.asarray(x, np.float64) for x in (query, key, value)]
    scores = np.einsum("bqhd,bkhd->bhqk", exact[0], exact[1]) / np.sqrt(8)
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", probs, exact[2])
    result = attention(query, key, value)
    assert result.dtype == dtype
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, atol=tolerance)
    row = attention_row_scores(query, key)
    assert row.dtype == jnp.float32
    np.testing.assert_allclose(row, scores[:, :, 0], atol=1e-5)
    np.testing.assert_allclose(attention_row_scores(query, key, 3), scores[:, :, 3], atol=1e-5)


def test_auto_takes_flash_attention_only_where_it_runs(monkeypatch):
    assert choose("auto", jnp.bfloat16, 64) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose("auto", jnp.bfloat16, 64) == "cudnn"
    assert choose("auto", jnp.float32, 64) == "xla"
    assert choose("auto", jnp.bfloat16, 20) == "xla"
    assert choose("xla", jnp.bfloat16, 64) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose("auto", jnp.bfloat16, 64) == "pallas" and choose("auto", jnp.float32, 64) == "xla"
