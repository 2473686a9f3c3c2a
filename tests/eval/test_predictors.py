"""Predict functions against the modules they wrap, with invented pictures and stores."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.config.schema import AdapterConfig, Config, EvalConfig, FeaturesConfig, StudentConfig
from tove_jax.data.picture import Picture
from tove_jax.data.view import View
from tove_jax.eval import predictors
from tove_jax.experts.base import ExpertFeatures
from tove_jax.methods import move_kd
from tove_jax.models import vit

STUDENT = StudentConfig(
    image_size=16,
    patch_size=8,
    width=12,
    layers=2,
    heads=2,
    mlp_width=16,
    feature="layers/-1",
    adapter=AdapterConfig(experts=2, rank=3),
)
CONFIG = Config(
    student=STUDENT, eval=EvalConfig(batch=4), features=FeaturesConfig(experts=("clip", "other")), title="t"
)
VIEW = View(16)


class Source:
    name, licence = "invented", "none"

    def __init__(self, count: int) -> None:
        self.ids = [f"id{index}" for index in range(count)]
        self.labels = ["a", "b"] * (count // 2)
        self.captions = [None] * count
        self.images = np.random.default_rng(0).integers(0, 255, (count, 16, 16, 3)).astype(np.uint8)
        self.reads = 0

    def __getitem__(self, index: int) -> Picture:
        self.reads += 1
        return Picture(self.ids[index], self.images[index])


class Store:
    """The part of a feature store that evaluation uses."""

    manifest = types.SimpleNamespace(
        statistics=types.SimpleNamespace(channel_mean=[0.5, 0.0, -0.5, 1.0, 0.25], centred_std=2.0)
    )

    def __init__(self, patches: np.ndarray, summary: np.ndarray | None = None) -> None:
        self.patches, self.summary = patches, summary

    def features(self, ids) -> ExpertFeatures:
        rows = [int(id.removeprefix("id")) for id in ids]
        return ExpertFeatures(self.patches[rows], None if self.summary is None else self.summary[rows])


@pytest.fixture(scope="module")
def source():
    return Source(10)


@pytest.fixture(scope="module")
def views(source):
    return predictors.Views(source, VIEW, 2)


@pytest.fixture(scope="module")
def params():
    return vit.from_config(STUDENT).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]


@pytest.fixture(scope="module")
def tokens(params, views):
    return predictors.encoder(CONFIG, params, views, adapters=True)


def _direct(student, params, images):
    pixels = VIEW.normalize(images)
    return np.asarray(vit.from_config(student).apply({"params": params}, pixels, intermediates=("layers/-1",))[0])


def test_student_tokens_with_and_without_adapters(params, views, source, tokens):
    chosen = [7, 2, 9, 0, 4, 5]
    direct = _direct(STUDENT, params, source.images[chosen])
    np.testing.assert_allclose(tokens(chosen), direct, atol=1e-5)
    plain = {name: value for name, value in params.items()}
    plain["layers"] = {
        **plain["layers"],
        "mlp": {k: v for k, v in params["layers"]["mlp"].items() if k != "adapter"},
    }
    bare = predictors.encoder(CONFIG, plain, views, adapters=False)
    without = dataclasses.replace(STUDENT, adapter=AdapterConfig(kind="none"))
    np.testing.assert_allclose(bare(chosen), _direct(without, plain, source.images[chosen]), atol=1e-5)
    assert np.abs(bare(chosen) - direct).max() > 1e-3
    np.testing.assert_allclose(predictors.pooled(tokens, "mean")(chosen), direct[:, 1:].mean(1), atol=1e-5)
    np.testing.assert_allclose(predictors.pooled(tokens, "cls")(chosen), direct[:, 0], atol=1e-5)


def test_pictures_are_cut_once(source):
    views, before = predictors.Views(source, VIEW, 1), source.reads
    np.testing.assert_array_equal(views([3, 1, 3]), source.images[[3, 1, 3]])
    views([1])
    assert source.reads == before + 2


def test_pixels_are_the_view_and_large_views_are_averaged(source, views):
    found = predictors.pixels_predictor(views)([0, 1])
    np.testing.assert_allclose(found, VIEW.normalize(source.images[:2]).reshape(2, -1), atol=1e-6)

    class Large(predictors.Views):
        def __call__(self, indices):
            return np.repeat(np.repeat(source.images[indices], 9, 1), 9, 2)

    large = predictors.pixels_predictor(Large(source, View(144), 1))([0, 1])
    assert large.shape == (2, 48 * 48 * 3)
    np.testing.assert_allclose(
        large.reshape(2, 16, 3, 16, 3, 3)[:, :, 0, :, 0], VIEW.normalize(source.images[:2]), atol=1e-5
    )


def test_experts_give_their_summary_or_their_mean_patch(source):
    generator = np.random.default_rng(1)
    patches, summary = generator.normal(size=(10, 2, 3, 5)), generator.normal(size=(10, 7))
    store = Store(patches, summary)
    np.testing.assert_allclose(predictors.expert_predictor(store, source)([4, 1]), summary[[4, 1]], rtol=1e-6)
    for bare in (
        predictors.expert_predictor(store, source, use_summary=False),
        predictors.expert_predictor(Store(patches), source),
    ):
        np.testing.assert_allclose(bare([4, 1]), patches[[4, 1]].mean(axis=(1, 2)), rtol=1e-5)


def test_every_reference_has_its_name_and_clip_is_pooled_like_the_start(params, views, source):
    patches, summary = np.ones((10, 2, 2, 12), np.float32), np.zeros((10, 12), np.float32)
    stores = {"clip": Store(patches, summary), "other": Store(patches, summary)}
    found = predictors.reference_predictors(CONFIG, params, views, source, stores)
    assert list(found) == ["pixels", "init", "clip", "other"]
    assert found["clip"]([0]).mean() == 1 and found["other"]([0]).mean() == 0
    cls = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, pool="cls"))
    assert predictors.reference_predictors(cls, params, views, source, stores)["clip"]([0]).mean() == 0


def test_feature_errors_by_their_definition(params, source, tokens):
    generator = np.random.default_rng(2)
    everyone = list(range(10))
    student = tokens(everyone)[:, 1:]
    clip = student.reshape(10, 2, 2, 12) + 0.1 * generator.normal(size=(10, 2, 2, 12))
    other = generator.normal(size=(10, 3, 3, 5)).astype(np.float32)
    adapter = move_kd.encoder_adapter(CONFIG.method, 4, 12)
    trained = {"other": adapter.init(jax.random.key(1), jnp.asarray(other[:1]))["params"]}
    stores = {"clip": Store(clip.astype(np.float32)), "other": Store(other)}
    for standardize, seen in (("none", other), ("centred", (other - Store.manifest.statistics.channel_mean) / 2)):
        config = dataclasses.replace(CONFIG, features=FeaturesConfig(("clip", "other"), standardize=standardize))
        found = predictors.feature_errors(
            config, trained, lambda chosen: tokens(chosen)[:, 1:], source, stores, everyone
        )
        targets = {
            "clip": clip.reshape(10, 4, 12),
            "other": adapter.apply({"params": trained["other"]}, seen),
        }
        for name, target in targets.items():
            target = np.asarray(target, np.float64)
            expected = ((student - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
            np.testing.assert_allclose(found[name], expected, rtol=1e-4)
        assert found["clip"] < 1 < found["other"]
