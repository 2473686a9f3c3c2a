"""Principal axes and PHI-S: what the papers define, in batches as in one piece."""

from __future__ import annotations

import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.experts import spectrum
from tove_jax.experts.spectrum import Basis, Covariance


def _tokens(width, count=4000):
    rng = np.random.default_rng(width)
    mixed = rng.normal(size=(count, width)) * np.geomspace(5, 0.01, width) @ rng.normal(size=(width, width))
    return (mixed + 100 * rng.normal(size=width)).astype(np.float32)


def _covariance(tokens, parts=1):
    covariance = Covariance()
    for part in np.array_split(tokens, parts):
        covariance.add(part)
    return covariance


def test_spectrum_is_that_of_the_whole():
    tokens = _tokens(12)
    exact = np.cov(tokens.astype(np.float64).T, bias=True)
    values, vectors = np.linalg.eigh(exact)
    for parts in (1, 7):
        mean, axes, variances = _covariance(tokens, parts).spectrum()
        np.testing.assert_allclose(mean, tokens.mean(0, dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(variances[:6], values[::-1][:6], rtol=1e-4)
        np.testing.assert_allclose(np.abs(np.sum(axes[:6] * vectors.T[::-1][:6], axis=1)), 1, atol=1e-4)
        assert (axes[np.arange(12), np.abs(axes).argmax(1)] > 0).all()


def test_principal_axes_lose_the_rest_of_the_variance():
    tokens = _tokens(12)
    covariance = _covariance(tokens)
    basis = spectrum.principal(covariance, 5)
    lost = np.square(basis.restore(basis.project(tokens)) - tokens).sum(-1).mean()
    np.testing.assert_allclose(lost, covariance.spectrum()[2][5:].sum(), rtol=1e-3)
    np.testing.assert_allclose(basis.components @ basis.components.T, np.eye(5), atol=1e-6)
    for channels in (0, 13):
        with pytest.raises(InputError, match="1 to 12 channels"):
            spectrum.principal(covariance, channels)
    with pytest.raises(InputError, match="found none"):
        Covariance().spectrum()


def test_stops_asking_for_tokens():
    covariance = _covariance(_tokens(4, count=64 * 4 - 1))
    assert not covariance.full()
    covariance.add(_tokens(4, count=1))
    assert covariance.full()


@pytest.mark.parametrize(
    "order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 76, 96, 1152, 1664, 512, 768, 1280, 1408, 3072]
)
def test_hadamard(order):
    """12, 20, 24, 28, 44, 60: Paley's first; 36, 76: his second; multiples by doubling."""
    matrix = spectrum.hadamard(order)
    np.testing.assert_allclose(np.abs(matrix), order**-0.5, rtol=1e-12)
    if order <= 1500:
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(order), atol=1e-10)


@pytest.mark.parametrize("order", [3, 10, 52, 92])
def test_no_hadamard(order):
    assert spectrum.hadamard(order) is None


@pytest.mark.parametrize("width", [1, 2, 3, 10, 12, 16])
def test_phi_s_makes_channels_alike_and_keeps_geometry(width):
    tokens = _tokens(width)
    basis = spectrum.phi_s(_covariance(tokens))
    found = basis.project(tokens).astype(np.float64)
    np.testing.assert_allclose(found.mean(0), 0, atol=2e-3)
    np.testing.assert_allclose(found.var(0), 1, rtol=2e-3)
    distance = np.linalg.norm(tokens[:100, None].astype(np.float64) - tokens[None, :100], axis=-1)
    ratio = np.linalg.norm(found[:100, None] - found[None, :100], axis=-1)[distance > 0] / distance[distance > 0]
    np.testing.assert_allclose(ratio, ratio[0], rtol=2e-3)


def test_phi_s_of_constant_tokens():
    basis = spectrum.phi_s(_covariance(np.full((8, 4), 3, np.float32)))
    np.testing.assert_array_equal(basis.project(np.full((2, 4), 3, np.float32)), 0)


def test_bytes_there_and_back():
    basis = spectrum.principal(_covariance(_tokens(6)), 3)
    content = basis.to_bytes()
    again = Basis.from_bytes(content, "here")
    assert again.to_bytes() == content
    np.testing.assert_array_equal(again.components, basis.components)
    for wrong in (b"", content[:20], Basis(basis.mean[:4], basis.components).to_bytes()):
        with pytest.raises(InputError, match="here"):
            Basis.from_bytes(wrong, "here")
