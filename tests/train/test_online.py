"""Experts inside the step: the same features and losses as from the store, only what is asked for is loaded."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from tests.train.conftest import ROOT, overrides
from tove_jax.config import from_file
from tove_jax.data import make_source
from tove_jax.data.loader import make_loader
from tove_jax.data.split import split
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import online, registry
from tove_jax.experts.computed import ComputedStore, open_or_compute
from tove_jax.experts.online import as_cut, load_online, online_experts
from tove_jax.experts.run import extract_all, open_stores
from tove_jax.experts.store import decode_features
from tove_jax.parallel import make_mesh
from tove_jax.train.checkpoint import load_student
from tove_jax.train.loop import train
from tove_jax.train.metrics import read_rows

EXPERTS = "--config.features.experts=('clip', 'efficientnet_lite0:64', 'pp_ocr_det:32')"
FLOAT = "--config.train.dtype=float32"
RAW = "--config.features.standardize=none"
ALL = "--config.features.online=('all',)"


@pytest.fixture(scope="module")
def ready(prepared, tmp_path_factory):
    """Returns ``configure(*more)`` of a run with features of three experts, plain and mirrored, and its start."""
    folder = tmp_path_factory.mktemp("online")
    shutil.copytree(prepared / "start", folder / "start")

    def configure(*more, experts=EXPERTS):
        places = f"--config.features.path={folder / 'features'}"
        plain = [word for word in overrides(prepared) if not word.startswith("--config.features.")]
        plain += [places, experts, FLOAT] + ([] if any("standardize" in word for word in more) else [RAW])
        return from_file(str(ROOT / "configs/demo.py:smoke"), [*plain, *more])

    assert configure().data.flip
    extract_all(configure(), folder, progress=False)
    return folder, configure


def losses(folder, configure, tmp_path, name, *more, devices=1):
    workdir = tmp_path / name
    shutil.copytree(folder / "start", workdir / "start")
    config = configure("--config.train.steps=3", "--config.train.log_every=1", *more)
    assert train(config, workdir, progress=False, devices=jax.devices()[:devices]) == 0
    rows = read_rows(workdir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key.startswith("loss")} for row in rows], workdir


def test_features_are_the_stores(ready):
    """Batches of the same pictures, mirrored alike, read and computed, also with grids that are pooled."""
    folder, configure = ready
    config = configure(ALL)
    found = load_online(config, folder)
    assert list(found.experts) == ["clip", "efficientnet_lite0"]
    # CLIP sees the student's own pixels; the other view is cut beside them.
    assert found.places["clip"] == online.STUDENT and len(found.views) == 1
    assert found.views[found.places["efficientnet_lite0"]].size == 64
    source = make_source(config.data)
    sides = split(source.ids, config.data.held_out, salt=config.data.split_salt)
    stores, flipped = (open_stores(config, folder, flip=flip, only=list(found.experts)) for flip in (False, True))
    given = {"batch": 8, "seed": 3, "threads": 1}
    view = View.of_student(config.student)
    read = make_loader(source, sides.train, view, stores, flip_readers=flipped, **given)
    computed = make_loader(source, sides.train, view, {}, flip_readers={}, views=found.views, **given)
    assert computed.batch_bytes == 8 * 3 * (32 * 32 + 64 * 64)
    prepare = jax.jit(found.prepare)
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        for wanted, shown, _ in zip(read, computed, range(3), strict=False):
            np.testing.assert_array_equal(wanted["record"], shown["record"])
            np.testing.assert_array_equal(wanted["pixels"], shown["pixels"])
            batch = prepare(found.params, shown)
            assert "views" not in batch
            for name, store in stores.items():
                stored = decode_features(store.manifest, wanted["features"][name])
                for field, value in stored._asdict().items():
                    ours = getattr(batch["features"][name], field)
                    assert (ours is None) == (value is None)
                    if value is not None:
                        scale = np.abs(value).max()
                        np.testing.assert_allclose(ours, value, rtol=2**-8, atol=1e-4 * scale)
    pooled = load_online(configure(ALL, "--config.features.codec=pool:1+bf16"), folder)
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    whole, mean = (one.features("clip", one.params["clip"], pixels).patches for one in (found, pooled))
    np.testing.assert_allclose(mean, np.mean(whole, (1, 2), keepdims=True), rtol=1e-5, atol=1e-5)


def test_losses_are_the_stores(ready, tmp_path):
    folder, configure = ready
    exact = "--config.student.adapter.dropout=0.0"
    stored, before = losses(folder, configure, tmp_path, "stored", exact)
    computed, workdir = losses(folder, configure, tmp_path, "computed", ALL, exact)
    assert len(stored) == len(computed) == 3
    for ours, theirs in zip(computed, stored, strict=True):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-3), name
    # Both know the same weights behind them, so that one goes on where the other stopped.
    assert load_student(workdir)[2] == load_student(before)[2]
    # Micro-batches on a sharded mesh, where experts are sharded too.
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.data=1", "--config.train.accumulation=2")
    sharded, _ = losses(folder, configure, tmp_path, "sharded", ALL, exact, *mesh, devices=2)
    for ours, theirs in zip(sharded, computed, strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-3)


def test_parameters_follow_dtype_and_mesh(ready):
    folder, configure = ready
    found = load_online(configure(ALL, "--config.train.dtype=bfloat16"), folder)
    clip = found.experts["clip"].params
    assert clip["layers"]["mlp"]["fc1"]["kernel"].dtype == "bfloat16"
    assert clip["pre_norm"]["scale"].dtype == np.float32
    config = configure(ALL, "--config.mesh.fsdp=2", "--config.mesh.data=1")
    mesh = make_mesh(config.mesh, jax.devices()[:2])
    placed = found.on(mesh)["clip"]["layers"]["mlp"]["fc1"]["kernel"]
    assert placed.sharding.shard_shape(placed.shape)[1] == placed.shape[1] // 2
    exact = load_online(configure(ALL), folder)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    half, whole = (one.features("clip", one.params["clip"], pixels).patches for one in (found, exact))
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, whole, atol=0.05 * float(np.abs(whole).max()))


def test_detached_experts_are_not_loaded(ready, monkeypatch):
    folder, configure = ready
    loaded = []
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda spec, **options: loaded.append(spec) or load(spec, **options))
    assert list(load_online(configure(ALL), folder, only=("efficientnet_lite0", "pp_ocr_det")).experts) == loaded[
        :0
    ] + ["efficientnet_lite0"]
    assert loaded == ["efficientnet_lite0:64"]
    assert not load_online(configure(), folder).experts and len(loaded) == 1


def test_evaluation_computes_what_is_not_stored(ready, tmp_path):
    folder, configure = ready
    config = configure(ALL, "--config.features.codec=pool:1+bf16,clip=bf16")
    elsewhere = dataclasses.replace(config, features=dataclasses.replace(config.features, path=str(tmp_path / "none")))
    source, names = make_source(config.data), ("clip", "efficientnet_lite0")
    found = open_or_compute(elsewhere, folder, source, names)
    assert all(isinstance(store, ComputedStore) for store in found.values())
    ids = list(source.ids[:3])
    for name, store in open_stores(configure(), folder, only=names).items():
        wanted, ours = store.features(ids), found[name].features(ids)
        assert ids[0] in found[name] and ours.patches.shape == (3, *found[name].manifest.shapes["patches"])
        patches = wanted.patches if name == "clip" else wanted.patches.mean((1, 2), keepdims=True)
        np.testing.assert_allclose(ours.patches, patches, rtol=2**-7, atol=1e-2 * np.abs(patches).max())
    with pytest.raises(InputError, match="no picture 'x' among the 24"):
        found["clip"].read("x")
    # A store that is there is read.
    assert not isinstance(open_or_compute(configure(ALL), folder, source, names)["clip"], ComputedStore)


def test_what_is_refused(ready, tmp_path):
    folder, configure = ready
    for names, message in (
        (("hed",), "features.online: expected some of clip, efficientnet_lite0, pp_ocr_det, or all, found 'hed'"),
        (("pp_ocr_det",), "expert 'pp_ocr_det' runs on the host"),
    ):
        with pytest.raises(InputError, match=message):
            online_experts(configure(f"--config.features.online={names!r}"))
    config = configure(ALL, "--config.features.standardize=centred")
    assert set(load_online(config, folder).manifests) == {"efficientnet_lite0"}
    elsewhere = dataclasses.replace(config, features=dataclasses.replace(config.features, path=str(tmp_path / "none")))
    with pytest.raises(
        InputError, match="'efficientnet_lite0' runs in the step.*takes statistics from a store.*'none'"
    ):
        load_online(elsewhere, folder)


def test_views_that_cut_alike():
    view = View(32, mean=(0.1, 0.2, 0.3), channels="bgr", scale=255.0)
    assert as_cut(view) == as_cut(View(32)) != as_cut(View(32, resize=40))
    padded = dataclasses.replace(view, fit="pad")
    assert as_cut(padded) != as_cut(View(32, fit="pad"))
    assert as_cut(padded) == as_cut(dataclasses.replace(padded, std=(2.0, 2.0, 2.0)))
