"""Principal components and overlays by their properties."""

from __future__ import annotations

import numpy as np

from tove_jax.report import maps


def _scene():
    generator = np.random.default_rng(0)
    where = generator.integers(0, 3, (4, 6, 5))
    return where, (np.eye(3)[where] * [9, 5, 3]) @ generator.normal(size=(3, 20))


def test_like_features_get_like_colours():
    where, features = _scene()
    colours = maps.principal_components(features + 1e-3 * np.random.default_rng(1).normal(size=features.shape))
    assert colours.dtype == np.uint8 and colours.shape == (4, 6, 5, 3)
    means = np.stack([colours[where == kind].mean(axis=0) for kind in range(3)])
    for kind in range(3):
        assert np.abs(colours[where == kind][:, :2] - means[kind, :2]).max() < 8
    assert min(np.abs(means[i] - means[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 60


def test_colours_ignore_shift_scale_and_do_not_depend_on_chance():
    features = _scene()[1] + np.random.default_rng(2).normal(size=(4, 6, 5, 20))
    colours = maps.principal_components(features)
    np.testing.assert_array_equal(colours, maps.principal_components(features.copy()))
    shifted = maps.principal_components(7 * features + 100).astype(int)
    assert np.abs(shifted - colours).max() <= 1


def test_few_or_constant_channels():
    one = maps.principal_components(np.arange(12.0).reshape(1, 3, 4, 1))
    assert one[..., 0].min() == 0 and one[..., 0].max() == 255 and (one[..., 1:] == 128).all()
    assert (maps.principal_components(np.ones((1, 2, 2, 4))) == 128).all()


def test_overlay_is_brightest_where_the_weight_is():
    image = np.full((64, 64, 3), 200, np.uint8)
    weights = np.zeros((8, 8))
    weights[2, 6] = 0.3
    laid = maps.overlay(image, weights)
    assert laid.shape == (64, 64, 3) and laid.dtype == np.uint8
    peak = np.unravel_index(laid.sum(axis=-1).argmax(), (64, 64))
    assert 14 <= peak[0] <= 25 and 46 <= peak[1] <= 57
    dark = maps.overlay(image, np.zeros((8, 8)))
    assert (dark == dark[..., :1]).all() and dark.sum(axis=-1).max() < laid.sum(axis=-1).max()


def test_the_ramp_only_brightens():
    steps = maps.colour_ramp(np.linspace(0, 1, 50)).astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(steps) > 0).all()


def test_squares_take_the_middle():
    image = np.zeros((50, 150, 3), np.uint8)
    image[:, 50:100] = 255
    assert (maps.square(image, 10) == 255).mean() > 0.7
