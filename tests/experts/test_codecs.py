"""Codecs: the stated error bounds, the edges of the number range, decoding inside jit."""

from __future__ import annotations

import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.experts import codecs, pooling
from tove_jax.experts.base import ExpertFeatures
from tove_jax.experts.spectrum import Covariance, principal

QUANTIZERS = (*codecs.QUANTIZERS, "int4:6")
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
    if codec.startswith("int4"):
        return _int4_bound(codecs.parse(codec).group, tokens)
    bound = {
        "float32": 0 * size,
        "bf16": size * 2.0**-8,
        "int8": absmax / 254 + 0 * size,
        "fp8": np.maximum(size / 16, absmax / (448 * 2**10)),
    }[codec]
    return bound * (1 + 1e-5) + (0 if codec == "float32" else TINY)


def _int4_bound(group: int, tokens: np.ndarray) -> np.ndarray:
    bound = np.empty(tokens.shape)
    for start in range(0, tokens.shape[-1], group):
        part = np.clip(tokens[..., start : start + group].astype(np.float64), -(2.0**125), 2.0**125)
        low, high = part.min(-1, keepdims=True), part.max(-1, keepdims=True)
        cut = np.abs(part - tokens[..., start : start + group])
        bound[..., start : start + group] = ((high - low) + np.abs(low) / 128) / 29 + cut
    return bound * (1 + 1e-5) + 2 * TINY


@pytest.mark.parametrize("codec", QUANTIZERS)
def test_error_bound_in_numpy_and_in_jit(codec):
    import jax
    import jax.numpy as jnp

    tokens = _tokens()
    payload = codecs.encode(codec, tokens)
    spec = codecs.payload_arrays(codec, {"patches": tokens.shape[1:]})
    assert {name: (value.shape[1:], value.dtype.name) for name, value in payload.items()} == spec
    decoded = codecs.decode(codec, payload, width=32)
    assert decoded.dtype == np.float32
    error = np.abs(decoded.astype(np.float64) - tokens)
    assert (error <= _bound(codec, tokens)).all()
    if codec != "float32":
        assert error.max() > 0
    on_device = jax.jit(lambda p: codecs.decode(codec, p, width=32))({k: jnp.asarray(v) for k, v in payload.items()})
    if codec.startswith("int4"):  # a fused multiply-add rounds once
        np.testing.assert_allclose(np.asarray(on_device), decoded, rtol=1e-5, atol=TINY)
    else:
        np.testing.assert_array_equal(np.asarray(on_device), decoded)
    half = jax.jit(lambda p: codecs.decode(codec, p, dtype=jnp.bfloat16, width=32))(
        {k: jnp.asarray(v) for k, v in payload.items()}
    )
    assert half.dtype == jnp.bfloat16


def test_the_bounds_are_reached():
    """A codec with a coarser step would break them: the bounds are not slack."""
    rng = np.random.default_rng(1)
    tokens = rng.uniform(-1, 1, (64, 256)).astype(np.float32)
    for codec in ("bf16", "int8", "fp8", "int4"):
        error = np.abs(codecs.decode(codec, codecs.encode(codec, tokens)).astype(np.float64) - tokens)
        assert (error / _bound(codec, tokens)).max() > 0.9, codec


@pytest.mark.parametrize("codec", QUANTIZERS)
def test_edges_of_the_number_range(codec):
    tokens = np.array(
        [[HUGE, -HUGE, 1.0, 0.0], [1e-42, -1e-44, 0, 0], [TINY, -TINY, TINY / 2, 0], [65504.0 * 200, 1, -1, 3e-8]],
        np.float32,
    )
    decoded = codecs.decode(codec, codecs.encode(codec, tokens), width=4)
    assert np.isfinite(decoded).all()
    assert (np.abs(decoded.astype(np.float64) - tokens) <= _bound(codec, tokens)).all()


@pytest.mark.parametrize("codec", QUANTIZERS)
def test_zero_tokens(codec):
    zeros = np.zeros((2, 3, 3, 8), np.float32)
    payload = codecs.encode(codec, zeros)
    np.testing.assert_array_equal(codecs.decode(codec, payload, width=8), zeros)
    for shape in ((2, 0, 0, 8), (0, 3, 3, 8), (1, 2, 2, 0)):
        assert codecs.decode(codec, codecs.encode(codec, np.zeros(shape, np.float32)), width=shape[-1]).shape == shape


@pytest.mark.parametrize("codec", QUANTIZERS)
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


@pytest.mark.parametrize(
    ("text", "spelt"),
    [
        ("int8", "int8"),
        ("pool:24", "pool:24+bf16"),
        ("pool:24x12+pca:256+int4:64", "pool:24x12+pca:256+int4"),
        ("pool:7x7+int4:32", "pool:7+int4:32"),
    ],
)
def test_one_spelling(text, spelt):
    assert str(codecs.parse(text)) == spelt == str(codecs.parse(spelt))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("in8", "'in8'.*did you mean 'int8'"),
        ("pol:8+int8", "'pol:8'.*did you mean 'pool'"),
        ("int8+pool:8", "'pool:8': expected pool, then pca"),
        ("int8+int8", "each once"),
        ("pool:0", "'pool:0': expected a number of 1 or more"),
        ("pool", "expected a number"),
        ("pool:2x3x4", "pool:n or pool:hxw"),
        ("pca:x", "found 'x'"),
        ("bf16:4", "'bf16' takes no number"),
        ("int4:7", "even group"),
        ("", "expected parts"),
    ],
)
def test_a_codec_that_is_none(text, message):
    with pytest.raises(InputError, match=message):
        codecs.parse(text)


def test_unknown_dtype():
    with pytest.raises(InputError, match="float16"):
        codecs.dtype_of("float16")


def test_codecs_of_single_experts():
    assert codecs.codec_of("int8", "clip") == "int8"
    assert codecs.codec_of("pool:8, clip=int8", "clip") == "int8"
    assert codecs.codec_of("pool:8, clip=int8", "hed") == "pool:8+bf16"
    for setting, message in (
        ("clip=int8", "no codec for expert 'hed'"),
        ("int8,bf16", "two codecs for all experts"),
        ("hed=int8,hed=bf16", "two codecs for hed"),
        ("int8,hed=int9", "did you mean 'int8'"),
    ):
        with pytest.raises(InputError, match=message):
            codecs.codec_of(setting, "hed")


@pytest.mark.parametrize(("grid", "wanted"), [((6, 8), (3, 4)), ((7, 9), (3, 4)), ((5, 8), (4, 8)), ((2, 3), (4, 4))])
def test_pooling_takes_means_over_windows(grid, wanted):
    import jax

    patches = np.random.default_rng(0).normal(size=(2, *grid, 3)).astype(np.float32)
    found = pooling.pool(patches, *wanted)
    high, wide = (min(side, most) for side, most in zip(grid, wanted, strict=True))
    exact = np.zeros((2, high, wide, 3))
    for i in range(high):
        for j in range(wide):
            rows = slice(i * grid[0] // high, -(-(i + 1) * grid[0] // high))
            columns = slice(j * grid[1] // wide, -(-(j + 1) * grid[1] // wide))
            exact[:, i, j] = patches[:, rows, columns].astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)
    on_device = jax.jit(lambda x: pooling.pool(x, *wanted))(patches)
    np.testing.assert_allclose(on_device, found, rtol=1e-5, atol=1e-6)
    again = pooling.pool(pooling.unpool(found, 4 * high, 4 * wide), high, wide)
    np.testing.assert_allclose(again, found, rtol=1e-6)


def test_pooling_is_torchs_adaptive_one():
    torch = pytest.importorskip("torch")
    patches = np.random.default_rng(0).normal(size=(2, 7, 10, 3)).astype(np.float32)
    wanted = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(patches).permute(0, 3, 1, 2), (4, 6))
    np.testing.assert_allclose(pooling.pool(patches, 4, 6), wanted.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_pooled_principal_axes_quantised():
    """Tokens that lie on five axes are kept by five axes, but for the quantiser; on the device as on the host."""
    import jax

    rng = np.random.default_rng(3)
    tokens = (rng.normal(size=(6, 4, 4, 5)) @ rng.normal(size=(5, 24)) + 3).astype(np.float32)
    covariance = Covariance()
    covariance.add(tokens)
    basis = principal(covariance, 5)
    for codec, error in (("pool:2+pca:5+float32", 1e-5), ("pool:2+pca:5+bf16", 2e-2), ("pool:2+pca:5+int8", 5e-2)):
        payload = codecs.encode(codec, tokens, basis=basis)
        shapes = codecs.stored_shapes(codec, {"patches": (4, 4, 24)})
        assert shapes == {"patches": (2, 2, 24)}
        assert payload["patches"].shape == (6, 2, 2, 5) == (6, *codecs.payload_arrays(codec, shapes)["patches"][0])
        found = codecs.decode(codec, payload, basis=basis)
        np.testing.assert_allclose(found, pooling.pool(tokens, 2, 2), atol=error)
        on_device = jax.jit(lambda p, codec=codec: codecs.decode(codec, p, basis=basis))(payload)
        np.testing.assert_allclose(on_device, found, atol=1e-5)
        for given in (None, principal(covariance, 4)):
            with pytest.raises(InputError, match="needs a basis of 5 axes"):
                codecs.encode(codec, tokens, basis=given)
