"""Rotary tables: what they do to scores, beside the parity of whole networks (tests/models/test_backbone.py)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.models import rotary

GRID = (3, 5)
TABLES = {"eva02": rotary.eva02(16, GRID), "dinov3": rotary.dinov3(16, GRID)}


def draw(tokens: int = 15) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, tokens, 2, 16)).astype(np.float32)


@pytest.mark.parametrize("name", TABLES)
def test_a_turn_keeps_lengths_and_leading_tokens(name):
    x = draw(18)
    y = np.asarray(TABLES[name](jnp.asarray(x)))
    np.testing.assert_array_equal(y[:, :3], x[:, :3])
    assert np.abs(y[:, 4:] - x[:, 4:]).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("name", TABLES)
def test_scores_depend_on_the_distance_alone(name):
    """One query and one key everywhere: pairs of places with the same offset get the same score."""
    table = TABLES[name]
    query, key = (np.broadcast_to(draw(1)[:, :, i : i + 1], (2, 15, 1, 16)) for i in range(2))
    scores = np.einsum("bqhd,bkhd->qk", table(jnp.asarray(query)), table(jnp.asarray(key))).reshape(*GRID, *GRID)
    np.testing.assert_allclose(scores[0, 0, 1, 2], scores[1, 2, 2, 4], rtol=1e-4)
    np.testing.assert_allclose(scores[0, 1, 2, 0], scores[0, 3, 2, 2], rtol=1e-4)
    assert abs(scores[0, 0, 1, 2] - scores[0, 0, 2, 1]) > 1e-3


def test_known_angles():
    """The first pair of each half turns fastest: by a radian a patch (EVA-02), by 2 pi / extent a patch (DINOv3)."""
    eva = rotary.eva02(16, GRID, reference=(6, 5))
    np.testing.assert_allclose(eva.cos[5, :2], np.cos(2.0), rtol=1e-6)  # row 1 of 3 lies where row 2 of 6 did
    np.testing.assert_allclose(eva.sin[1, 8:10], np.sin(1.0), rtol=1e-6)
    np.testing.assert_allclose(eva.cos[1, :8], 1.0)
    dino = rotary.dinov3(16, GRID)
    np.testing.assert_allclose(dino.sin[0, [0, 4]], np.sin(2 * np.pi * np.array([-2 / 3, -4 / 5])), rtol=1e-5)
    np.testing.assert_array_equal(dino.cos[:, :8], dino.cos[:, 8:])


def test_half_precision_and_faults():
    x = draw().astype(np.float32)
    exact = TABLES["eva02"](jnp.asarray(x))
    half = TABLES["eva02"](jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(np.float32) - exact).max() < 0.05
    for build in (rotary.eva02, rotary.dinov3):
        with pytest.raises(InputError, match="expected a multiple of 4 channels a head, found 6"):
            build(6, GRID)
