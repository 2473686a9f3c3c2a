"""The codecs' table: bytes as stored, and losses that equal those of a run with such stores."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tove_jax.cli.main import main
from tove_jax.config import from_file
from tove_jax.config.schema import Config, FeaturesConfig
from tove_jax.errors import InputError
from tove_jax.eval import codec_loss
from tove_jax.experts.manifest import Manifest
from tove_jax.experts.run import expert_cards, extract_all, open_stores, standardized

ROOT = Path(__file__).parents[2]
EXPERTS = "--config.features.experts=('clip', 'pp_ocr_det:64')"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codecs")
    rng = np.random.default_rng(0)
    (folder / "pictures" / "a").mkdir(parents=True)
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"pictures/a/{number:02d}.png")
    return folder


def _config(workdir, *more) -> Config:
    words = [
        "--config.data.source=folder",
        f"--config.data.path={workdir / 'pictures'}",
        "--config.data.limit=0",
        "--config.student.image_size=32",
        "--config.method.teacher_prior=()",
        "--config.eval.batch=8",
        EXPERTS,
    ]
    return from_file(str(ROOT / "configs/demo.py:smoke"), [*words, *more])


@pytest.fixture(scope="module")
def rows(workdir):
    config = _config(workdir)
    extract_all(config, workdir, progress=False)
    settings = ("float32", "int8", "int4", "pool:2+int8", "pca:8", "int4,clip=bf16")
    return codec_loss.codec_losses(config, workdir, settings, records=16)


def test_rows(rows, workdir):
    bf16, float32, int8, int4, pooled, axes, mixed = rows
    manifests = [store.manifest for store in open_stores(_config(workdir), workdir).values()]
    assert bf16.bytes == sum(manifest.record_bytes for manifest in manifests)
    assert bf16.change == 0 and bf16.gradient == 0 and set(bf16.errors) == {"clip", "pp_ocr_det"}
    # The stores are bf16 already.
    assert float32.change == 0 and float32.gradient == 0 and float32.errors == bf16.errors
    assert 0 < abs(int8.change) < 1e-2 and 0 < int8.gradient < int4.gradient < 1
    assert 0 < int8.errors["clip"] < int4.errors["clip"] < 0.2
    assert mixed.errors["clip"] == 0 and mixed.errors["pp_ocr_det"] == int4.errors["pp_ocr_det"]
    assert int4.bytes < mixed.bytes < bf16.bytes and int4.bytes < int8.bytes < bf16.bytes
    assert pooled.bytes < int8.bytes and axes.bytes < bf16.bytes
    assert all(math.isfinite(row.loss) for row in rows)
    lines = codec_loss.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and "| `int8` |" in lines[4]
    assert "`clip=bf16,pp_ocr_det=int4`" in lines[-1]


def test_the_grid_that_training_sees(rows, workdir, tmp_path):
    """A pooling codec changes the experts' cards, the stores and the check between them alike."""
    config = _config(workdir, "--config.features.codec=pool:1+pca:5+int4,clip=bf16")
    cards = expert_cards(config, tmp_path)
    assert (cards["clip"].grid, cards["pp_ocr_det"].grid) == ((4, 4), (1, 1))
    extract_all(config, tmp_path, progress=False)
    stores, flipped = open_stores(config, tmp_path), open_stores(config, tmp_path, flip=True)
    store = stores["pp_ocr_det"]
    assert store.manifest.codec == "pool:1+pca:5+int4" and stores["clip"].manifest.codec == "bf16"
    assert store.features(store.ids[:2]).patches.shape == (2, 1, 1, 96)
    assert flipped["pp_ocr_det"].manifest.basis_hash == store.manifest.basis_hash
    with pytest.raises(InputError, match="holds .* a record, but"):
        open_stores(_config(workdir), tmp_path)


def test_phi_s_is_fitted_once_and_seen_by_methods(rows, workdir):
    config = _config(workdir, "--config.features.standardize=phi_s")
    path = workdir / "features" / "pp_ocr_det"
    assert Manifest.read(path).phi_s is None
    stores = open_stores(config, workdir)
    assert open_stores(config, workdir)["pp_ocr_det"].manifest.phi_s_hash == Manifest.read(path).phi_s_hash
    assert stores["clip"].manifest.phi_s is None
    store = stores["pp_ocr_det"]
    features = store.features(store.ids)
    found = standardized(config, "pp_ocr_det", store.manifest, features).patches
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-2)
    np.testing.assert_allclose(found.var((0, 1, 2)), 1, rtol=2e-2)
    assert standardized(config, "clip", stores["clip"].manifest, features) is features
    with pytest.raises(InputError, match="was not fitted"):
        standardized(config, "pp_ocr_det", dataclasses.replace(store.manifest, phi_s=None), features)


def test_sizes_of_the_papers_experts(capsys):
    config = Config(features=FeaturesConfig(experts=("clip", "eva02_l", "convnext_xxl")))
    cards = codec_loss.published_cards(config)
    tokens = 24 * 24 * 1024 + 64 * 64 * 1024 + 32 * 32 * 3072
    rest = 4 * (1024 + 2 * 24 * 24) + 4 * sum(card.summary_width or 0 for card in list(cards.values())[1:])
    assert codec_loss.picture_bytes(cards, "bf16") == 2 * tokens + rest
    assert codec_loss.picture_bytes(cards, "int4") == tokens // 2 + tokens // 64 * 4 + rest
    assert codec_loss.picture_bytes(cards, "float32,eva02_l=pool:32") == 4 * tokens - 64 * 64 * 1024 * 3.5 + rest
    assert main(["features", "sizes", f"--config={ROOT / 'configs/move_kd_vit_l.py'}", "--codecs", "int4"]) == 0
    assert "| `bf16` | 15.8" in capsys.readouterr().out


def test_wants_stores_that_lose_little(rows, workdir, tmp_path):
    config = _config(workdir, "--config.features.codec=int8")
    extract_all(config, tmp_path, progress=False)
    with pytest.raises(InputError, match="expected a store of float32 or bf16, found int8"):
        codec_loss.codec_losses(config, tmp_path, records=8)
