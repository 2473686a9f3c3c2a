"""Detaching experts: contributions, order, scores, text loss, latency, table and plot, on a small invented run."""

from __future__ import annotations

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tove_jax.cli import export as export_command
from tove_jax.config.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    EvalConfig,
    FeaturesConfig,
    MoveKDConfig,
    StudentConfig,
    ToVEConfig,
)
from tove_jax.data.picture import Picture
from tove_jax.data.view import View
from tove_jax.data.vocabulary import Vocabulary
from tove_jax.errors import InputError
from tove_jax.eval import detach, predictors
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures
from tove_jax.experts.extract import extract
from tove_jax.experts.run import store_path
from tove_jax.methods import tove
from tove_jax.models import vit

COUNT = 24
CONFIG = Config(
    title="t",
    student=StudentConfig(
        image_size=8, patch_size=4, width=8, layers=1, heads=2, mlp_width=8, feature="layers/-1",
        adapter=AdapterConfig(kind="none"),
    ),
    method=ToVEConfig(hidden=6, vocabulary=4, gate_init="linear"),
    features=FeaturesConfig(experts=("bright", "noise"), codec="float32", shard_records=16, batch=8),
    eval=EvalConfig(batch=8, resamples=5, neighbours=1),
    data=DataConfig(held_out=0.5),
)  # fmt: skip
VIEW = View(8)


class Source:
    """Dark and light pictures, whose captions say which."""

    name, licence = "invented", "none"

    def __init__(self):
        self.ids = [f"id{index}" for index in range(COUNT)]
        self.labels = ["dark", "light"] * (COUNT // 2)
        self.captions = [None if index == 5 else f"a {label} square" for index, label in enumerate(self.labels)]

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        level = 40 + 5 * index if index % 2 == 0 else 255 - 5 * index
        return Picture(self.ids[index], np.full((8, 8, 3), level, np.uint8), label=self.labels[index])


def expert(name, backend, function):
    known = dict.fromkeys(("title", "paper", "weights", "licence"), "none")
    card = ExpertCard(name=name, view=VIEW, grid=(2, 2), width=3, backend=backend, **known)
    return Expert(card, {}, f"hash-{name}", function)


def bright(params, pixels):
    return ExpertFeatures(jax.image.resize(pixels / 255.0, (pixels.shape[0], 2, 2, 3), "linear"))


def noise(params, pixels):
    return ExpertFeatures(np.random.default_rng(0).standard_normal((len(pixels), 2, 2, 3)).astype(np.float32))


EXPERTS = {"bright": expert("bright", "jax", bright), "noise": expert("noise", "host", noise)}


@pytest.fixture(scope="module")
def source():
    return Source()


@pytest.fixture(scope="module")
def stores(source, tmp_path_factory):
    from tove_jax.experts.store import FeatureStore

    folder, found = tmp_path_factory.mktemp("run"), {}
    for name, one in EXPERTS.items():
        path = store_path(CONFIG, folder, name)
        extract(one, source, range(COUNT), path, codec="float32", shard_records=16, batch=8, progress=False)
        found[name] = FeatureStore.open(path)
    return found


@pytest.fixture(scope="module")
def params():
    student = vit.from_config(CONFIG.student).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    cards = {name: one.card for name, one in EXPERTS.items()}
    method = tove.init_extra(CONFIG, cards, 4, jax.random.key(1))
    # The gate turns to `noise`.
    method["gate"]["bias"] = jnp.array([0.0, 2.0])
    return {"student": student, "method": method}


@pytest.fixture(scope="module")
def views(source):
    return predictors.Views(source, VIEW, 1)


@pytest.fixture
def run(monkeypatch, source, stores, params, tmp_path):
    words = Vocabulary.build(source.captions, size=4, minimum=2, length=3)
    words.write(tmp_path)
    provenance = {"step": 7, "vocabulary": words.hash}
    opened = []

    def open_stores(config, workdir, *, only):
        opened.append(tuple(only))
        return {name: stores[name] for name in only}

    monkeypatch.setattr(detach, "load_student", lambda workdir, step: (CONFIG, params, provenance))
    monkeypatch.setattr(detach, "open_stores", open_stores)
    sides = list(range(0, COUNT, 4)) + list(range(1, COUNT, 4)), list(range(2, COUNT, 4)) + list(range(3, COUNT, 4))
    monkeypatch.setattr(predictors, "run_folder_source", lambda config: (source, *sides))
    monkeypatch.setattr(detach.registry, "load", lambda spec, **options: EXPERTS[spec])
    monkeypatch.setattr(detach, "load_options", lambda *unused: {})
    return tmp_path, sides, opened


def by_hand(config, params, views, stores, source, indices):
    """T' and gates of pictures, without batches or stores' codecs."""
    pixels = VIEW.normalize(views(indices))
    features = {name: stores[name].features([source.ids[i] for i in indices]) for name in tove.deployed_experts(config)}
    clip = tove.clip_tokens(vit.from_config(config.student), params, jnp.asarray(pixels), config)
    return clip, tove.enrich(params["method"], clip, features, config)


def test_deployed_tokens_are_the_enriched_ones(params, views, source, stores):
    chosen = [5, 0, 9, 3, 2, 1, 7, 11, 4]
    for names in (("bright", "noise"), ("noise",), ()):
        config = tove.attach(CONFIG, names)
        clip, found = by_hand(config, params, views, stores, source, chosen)
        given = {name: stores[name] for name in names}
        tokens = predictors.deployed(config, params, views, source, given)
        np.testing.assert_allclose(tokens(chosen), found.tokens, atol=1e-5)
        if not names:
            np.testing.assert_allclose(tokens(chosen), clip, atol=1e-5)
    feature = predictors.student_predictor(CONFIG, params["student"], views, tokens)(chosen)
    np.testing.assert_allclose(feature, np.asarray(clip).mean(1), atol=1e-5)
    cls = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, pool="cls"))
    assert np.abs(predictors.student_predictor(cls, params["student"], views, tokens)(chosen) - feature).max() > 1e-2
    assert predictors.feature_errors(CONFIG, params["method"], tokens, source, stores, chosen) == {}


def test_contributions_are_means_over_pictures_and_tokens(params, views, source, stores):
    chosen = list(range(11))
    _, found = by_hand(CONFIG, params, views, stores, source, chosen)
    gate = np.asarray(found.gate)
    measured = detach.contributions(CONFIG, params, views, source, stores, chosen)
    assert list(measured) == ["bright", "noise"]
    for k, value in enumerate(measured.values()):
        np.testing.assert_allclose(value.gate, gate[..., k].mean(), rtol=1e-5)
        np.testing.assert_allclose(value.share, (gate.argmax(-1) == k).mean(), rtol=1e-5)
    assert detach.detachment_order(measured) == ["bright", "noise"]
    even = {"b": detach.Contribution(0.5, 0), "a": detach.Contribution(0.5, 1)}
    assert detach.detachment_order(even) == ["a", "b"]


def test_text_loss_is_a_mean_over_captioned_pictures(params, source, views, stores):
    table = Vocabulary.build(source.captions, size=4, minimum=2, length=3).encode(source.captions)
    indices = [5, 6, 7, 8, 9]
    tokens = predictors.deployed(CONFIG, params, views, source, stores)
    found = detach.text_loss(params["method"], tokens, table, indices, batch=3)
    captioned = [6, 7, 8, 9]
    losses, told = tove.text_losses(
        params["method"], tokens(captioned), np.maximum(table[captioned], 0), table[captioned] >= 0
    )
    assert told.all()
    np.testing.assert_allclose(found, losses.mean(), rtol=1e-5)
    assert np.isnan(detach.text_loss(params["method"], tokens, table, [5], batch=3))


def test_a_run_is_detached_from_the_least_to_none(run, params, views, source, stores):
    folder, (train, held_out), opened = run
    result = detach.detach_run(None, folder, batch=2, repeats=1, progress=False)
    assert opened == [("bright", "noise")]
    assert [row["attached"] for row in result["rows"]] == [["bright", "noise"], ["noise"], []]
    assert [row["detached"] for row in result["rows"]] == [None, "bright", "noise"] and result["order"] == [
        "bright",
        "noise",
    ]
    assert json.loads((folder / "eval" / "detach.json").read_text()) == result
    assert result["step"] == 7 and result["pictures"] == {"calibration": 12, "held_out": 12}
    times = result["latency"]["experts"]
    assert result["latency"]["batch"] == 2 and all(value > 0 for value in times.values())
    for row in result["rows"]:
        assert row["experts_ms"] == sum(times[name] for name in row["attached"])
        assert row["total_ms"] == row["experts_ms"] + row["encoder_ms"] > 0
        assert row["text"] > 0 and row["knn_low"] <= row["knn"] <= row["knn_high"]
    # The last row is plain CLIP.
    clip, _ = by_hand(CONFIG, params, views, stores, source, train + held_out)
    pooled = np.asarray(clip).mean(1)
    from tove_jax.eval import knn

    labels = np.array([source.labels[i] == "light" for i in train], int)
    answers = knn.classify(pooled[: len(train)], labels, pooled[len(train) :], 1)
    assert result["rows"][-1]["knn"] == np.mean(answers == [source.labels[i] == "light" for i in held_out])
    picture = np.asarray(Image.open(folder / "eval" / "detach.png"))
    assert picture.shape[0] > 300 and picture.std() > 10
    text = detach.table(result)
    assert "bright  mean weight" in text and "latency: batch of 2" in text and text.count(" ms\n") >= 2


def test_without_latency_no_expert_is_loaded(run, monkeypatch):
    folder, *_ = run
    monkeypatch.setattr(detach.registry, "load", None)
    result = detach.detach_run(CONFIG, folder, pictures=3, latency=False, progress=False)
    assert result["latency"] is None and result["rows"][0]["total_ms"] is None
    assert result["pictures"]["calibration"] == 3
    assert Image.open(io.BytesIO(detach.plot(result))).format == "PNG"
    assert "latency:" not in detach.table(result)


def test_what_cannot_be_detached_is_said(run, monkeypatch, params):
    folder, *_ = run
    with pytest.raises(InputError, match="expected positive numbers, found batch 0"):
        detach.detach_run(None, folder, batch=0)
    (folder / "vocabulary.json").write_text("{}")
    with pytest.raises(InputError, match="expected a vocabulary"):
        detach.detach_run(None, folder, progress=False)
    for config, words in (
        (tove.attach(CONFIG, ()), "no expert is attached"),
        (
            dataclasses.replace(CONFIG, method=MoveKDConfig()),
            "expected a run of ToVE, found config.method.name 'move_kd'",
        ),
    ):
        monkeypatch.setattr(detach, "load_student", lambda workdir, step, config=config: (config, params, {"step": 1}))
        with pytest.raises(InputError, match=words):
            detach.detach_run(None, folder)
    assert not (folder / "eval").exists()


def test_export_refuses_an_encoder_that_needs_experts(monkeypatch, tmp_path, params):
    from tove_jax.train import checkpoint

    monkeypatch.setattr(checkpoint, "load_student", lambda workdir, step: (CONFIG, params, {"step": 1}))
    with pytest.raises(InputError, match=r"needs its experts beside it \(bright, noise\).*tove merge"):
        export_command.export_run(CONFIG, tmp_path)
    assert list(tmp_path.iterdir()) == []
