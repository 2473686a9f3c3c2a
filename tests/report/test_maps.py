"""Principal components and overlays by their properties."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.config.schema import (
    AdapterConfig,
    Config,
    FeaturesConfig,
    HawaiiConfig,
    MoveKDConfig,
    StudentConfig,
    ToVEConfig,
)  # fmt: skip
from tove_jax.experts.base import ExpertFeatures
from tove_jax.methods import hawaii, tove
from tove_jax.models import vit
from tove_jax.report import maps


class Card(NamedTuple):
    """What a method reads of an expert's card."""

    grid: tuple[int, int]
    width: int


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


def test_an_overlay_between_given_weights():
    image, weights = np.full((32, 32, 3), 100, np.uint8), np.full((4, 4), 0.5)
    half, full, none = (maps.overlay(image, weights, *ends) for ends in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0)))
    assert none.sum() < half.sum() < full.sum()
    np.testing.assert_array_equal(none, maps.overlay(image, 0 * weights))


SIDE = 4
STUDENT = StudentConfig(
    image_size=32, patch_size=8, width=12, layers=2, heads=2, mlp_width=16, feature="layers/-1",
    adapter=AdapterConfig(kind="none"),
)  # fmt: skip


@pytest.fixture(scope="module")
def scene():
    """Parameters of a small tower, pixels of two pictures, and two experts' features of them."""
    generator = np.random.default_rng(3)
    params = vit.from_config(STUDENT).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    pixels = generator.integers(0, 256, (2, 32, 32, 3), np.uint8)
    attention = generator.dirichlet(np.ones(SIDE**2), 2).astype(np.float32)
    features = {
        "clip": ExpertFeatures(generator.normal(size=(2, SIDE, SIDE, 12)).astype(np.float32), cls_attention=attention),
        "other": ExpertFeatures(generator.normal(size=(2, 3, 3, 5)).astype(np.float32)),
    }
    return params, pixels, features


def config_of(method):
    return Config(student=STUDENT, method=method, features=FeaturesConfig(("clip", "other")))


def test_the_tokens_of_tove_are_the_enriched_ones(scene):
    params, pixels, features = scene
    config = config_of(ToVEConfig(hidden=8, text_weight=0.0, gate_init="linear"))
    cards = {
        name: Card((SIDE, SIDE) if name == "clip" else (3, 3), features[name].patches.shape[-1]) for name in features
    }
    own = tove.init_extra(config, cards, SIDE**2, jax.random.key(1))
    both = {"student": params, "method": own}
    enriched = maps.deployed_tokens(config, both, pixels, features)
    bare = maps.deployed_tokens(tove.attach(config, []), both, pixels, features)
    assert enriched.shape == bare.shape == (2, SIDE**2, 12) and np.abs(enriched - bare).max() > 0.01
    gates = maps.token_weights(config, both, pixels, features, enriched)
    assert list(gates) == ["clip", "other"]
    np.testing.assert_allclose(sum(gates.values()), 1, atol=1e-6)
    assert maps.token_weights(tove.attach(config, []), both, pixels, features, bare) == {}
    # What the gate of one expert alone gives, does not depend on the other's features.
    alone = maps.token_weights(tove.attach(config, ["other"]), both, pixels, {"other": features["other"]}, bare)
    np.testing.assert_allclose(alone["other"], 1, atol=1e-6)


def test_token_weights_of_hawaii_are_the_scores_of_its_loss(scene):
    params, pixels, features = scene
    student = dataclasses.replace(STUDENT, adapter=AdapterConfig(kind="mola", rank=2, router_width=4))
    config = dataclasses.replace(config_of(HawaiiConfig(head_width=6)), student=student)
    cards = {
        name: Card((SIDE, SIDE) if name == "clip" else (3, 3), features[name].patches.shape[-1]) for name in features
    }
    own = hawaii.init_extra(config, cards, SIDE**2, jax.random.key(1))
    tokens = np.zeros((2, SIDE**2, 12), np.float32)
    scores = maps.token_weights(config, {"student": params, "method": own}, pixels, features, tokens)
    assert list(scores) == ["clip", "other"] and scores["other"].shape == (2, SIDE**2)
    for name, found in scores.items():
        wanted = hawaii.target(config.method, own[name], features[name], jnp.asarray(tokens))
        np.testing.assert_allclose(found, hawaii.token_scores(config.method, wanted, None, None), atol=1e-6)
    off = dataclasses.replace(config, method=HawaiiConfig(token_scoring=False))
    assert maps.token_weights(off, {"student": params, "method": own}, pixels, features, tokens) == {}


def test_token_weights_of_move_kd_are_clips(scene):
    params, pixels, features = scene
    config = config_of(MoveKDConfig(token_weight_source="probs"))
    found = maps.token_weights(config, {"student": params, "method": {}}, pixels, features, np.zeros(0))
    np.testing.assert_allclose(found["clip"], features["clip"].cls_attention, rtol=1e-5)
    for changed in (MoveKDConfig(token_weighting=False), MoveKDConfig(clip_expert="none")):
        assert maps.token_weights(config_of(changed), {"student": params}, pixels, features, np.zeros(0)) == {}
