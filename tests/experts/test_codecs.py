"""Codecs: the stated error bounds, the edges of the number range, decoding inside jit."""

from __future__ import annotations

import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.experts import codecs
from tove_jax.experts.base import ExpertFeatures

TINY = np.finfo(np.float32).tiny
HUGE = np.finfo(np.float32).max


def _tokens() -> np.ndarray:
    """(4, 5, 6, 32) tokens of very different magnitudes, with outliers and zeros in between."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(4, 5, 6, 32)) * 10.0 ** rng.integers(-20, 20, size=(4, 5, 6, 1))
    tokens[0, 0, 0] = 0.0
    tokens[0, 0, 1, 3:] = 0.0
    tokens[1, 2, 3, 7] *= 1e6
    return tokens.astype(np.float32)


def _bound(codec: str, tokens: np.ndarray) -> np.ndarray:
    absmax = np.abs(tokens).max(-1, keepdims=True).astype(np.float64)
    size = np.abs(tokens).astype(np.float64)
    bound = {
        "float32": 0 * size,
        "bf16": size * 2.0**-8,
        "int8": absmax / 254 + 0 * size,
        "fp8": np.maximum(size / 16, absmax / (448 * 2**10)),
    }[codec]
    return bound * (1 + 1e-5) + (0 if codec == "float32" else TINY)


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_error_bound_in_numpy_and_in_jit(codec):
    import jax
    import jax.numpy as jnp

    tokens = _tokens()
    payload = codecs.encode(codec, tokens)
    spec = codecs.payload_arrays(codec, {"patches": tokens.shape[1:]})
    assert {name: (value.shape[1:], value.dtype.name) for name, value in payload.items()} == spec
    decoded = codecs.decode(codec, payload)
    assert decoded.dtype == np.float32
    error = np.abs(decoded.astype(np.float64) - tokens)
    assert (error <= _bound(codec, tokens)).all()
    if codec != "float32":
        assert error.max() > 0
    on_device = jax.jit(lambda p: codecs.decode(codec, p))({k: jnp.asarray(v) for k, v in payload.items()})
    np.testing.assert_array_equal(np.asarray(on_device), decoded)
    half = jax.jit(lambda p: codecs.decode(codec, p, dtype=jnp.bfloat16))(
        {k: jnp.asarray(v) for k, v in payload.items()}
    )
    assert half.dtype == jnp.bfloat16


def test_the_bounds_are_reached():
    """A codec with a coarser step would break them: the bounds are not slack."""
    rng = np.random.default_rng(1)
    tokens = rng.uniform(-1, 1, (64, 256)).astype(np.float32)
    for codec in ("bf16", "int8", "fp8"):
        error = np.abs(codecs.decode(codec, codecs.encode(codec, tokens)).astype(np.float64) - tokens)
        assert (error / _bound(codec, tokens)).max() > 0.9, codec


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_edges_of_the_number_range(codec):
    tokens = np.array(
        [[HUGE, -HUGE, 1.0, 0.0], [1e-42, -1e-44, 0, 0], [TINY, -TINY, TINY / 2, 0], [65504.0 * 200, 1, -1, 3e-8]],
        np.float32,
    )
    decoded = codecs.decode(codec, codecs.encode(codec, tokens))
    assert np.isfinite(decoded).all()
    assert (np.abs(decoded.astype(np.float64) - tokens) <= _bound(codec, tokens)).all()


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_zero_tokens(codec):
    zeros = np.zeros((2, 3, 3, 8), np.float32)
    payload = codecs.encode(codec, zeros)
    np.testing.assert_array_equal(codecs.decode(codec, payload), zeros)
    for shape in ((2, 0, 0, 8), (0, 3, 3, 8), (1, 2, 2, 0)):
        assert codecs.decode(codec, codecs.encode(codec, np.zeros(shape, np.float32))).shape == shape


@pytest.mark.parametrize("codec", codecs.CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_name_record_expert_and_field(codec, bad):
    features = ExpertFeatures(np.ones((3, 2, 2, 4), np.float32), summary=np.ones((3, 5), np.float32))
    features.patches[1, 1, 0, 2] = bad
    with pytest.raises(InputError, match=r"record 'b', expert 'hed', patches.*\(1, 0, 2\)"):
        codecs.encode_features(codec, features, ["a", "b", "c"], "hed")
    features.patches[1, 1, 0, 2] = 1
    features.summary[2, 0] = bad
    with pytest.raises(InputError, match="record 'c', expert 'hed', summary"):
        codecs.encode_features(codec, features, ["a", "b", "c"], "hed")
    # The third row is padding now, and padding may hold anything.
    assert len(codecs.encode_features(codec, features, ["a", "b"], "hed")) == 2


def test_float64_beyond_float32_is_refused():
    with pytest.raises(InputError, match="finite"):
        codecs.encode("bf16", np.array([[1e300]]))


def test_codec_touches_patches_only():
    row = np.full((1, 4), 0.3)
    features = ExpertFeatures(np.full((1, 2, 2, 4), 0.3), summary=row, cls_attention=row, cls_scores=-row)
    (payload,) = codecs.encode_features("int8", features, ["a"], "clip")
    assert list(payload) == ["patches", "patches.scale", "summary", "cls_attention", "cls_scores"]
    assert [value.dtype.name for value in payload.values()] == ["int8"] + ["float32"] * 4


def test_unknown_codec_and_dtype():
    with pytest.raises(InputError, match="'in8'.*did you mean 'int8'"):
        codecs.encode("in8", np.ones((1, 1)))
    with pytest.raises(InputError, match="float16"):
        codecs.dtype_of("float16")


def test_reconstruction_errors_order():
    tokens = np.random.default_rng(2).normal(size=(4, 3, 3, 64))
    errors = codecs.reconstruction_errors(tokens)
    assert errors["float32"].relative == 0
    assert errors["float32"].bytes == 9 * 64 * 4 and errors["int8"].bytes == 9 * (64 + 4)
    assert 0 < errors["bf16"].relative < errors["int8"].relative < errors["fp8"].relative < 0.05
