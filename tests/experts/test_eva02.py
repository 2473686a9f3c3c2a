"""The EVA-02 expert: published names, the view, and a tiny detector's checkpoint through the registry."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from skimage import data as photographs

from tests.encoder_rules import draw_weights, read_names
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import eva02, registry
from tove_jax.hf.rules import to_arrays
from tove_jax.models.eva02_det import Eva02Detection

ROW = eva02.ROWS[0]
TINY = dataclasses.replace(
    ROW,
    card=dataclasses.replace(ROW.card, name="eva02_tiny", view=View(128), grid=(8, 8), width=64, parameters=251_168),
    build=lambda size: Eva02Detection(
        grid=4, width=64, depth=4, heads=4, mlp_width=170, global_layers=(2,), window=4
    ),
    rules=eva02.rules(4, (2,)),
    file="det/tiny.pth",
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(registry._ENTRIES, "eva02_tiny", registry.entry(TINY))


@pytest.fixture(scope="module")
def backbone():
    return draw_weights(read_names("eva02_det_names.json")["tiny"])


def test_published_names_and_shapes():
    expected = read_names("eva02_det_names.json")["eva02_l"]
    assert ROW.published_shapes() == {f"backbone.net.{name}": shape for name, shape in expected.items()}
    assert ROW.card.parameters == sum(map(math.prod, ROW.shapes().values()))
    assert ROW.card == registry.describe("eva02_l")
    assert ROW.build(1024).global_layers == (2, 5, 8, 11, 14, 17, 20, 23)


def test_view_is_clips_processor_at_1024():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 1024}, crop_size={"height": 1024, "width": 1024}
    )
    picture, view = photographs.chelsea(), ROW.card.view
    expected = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.abs(view.normalize(view.cut(picture)) - expected).max() * max(view.std) <= 1 / 255


def test_a_detectors_checkpoint(tiny, backbone, tmp_path):
    """As detectron2 saves: the weights under ``model``, the other parts beside them, the rotary tables as buffers."""
    torch = pytest.importorskip("torch")
    state = {f"backbone.net.{name}": torch.from_numpy(value) for name, value in backbone.items()}
    state["backbone.net.rope_win.freqs_cos"] = state["backbone.net.blocks.0.attn.rope.freqs_sin"] = torch.ones(16, 16)
    state["backbone.simfp_2.0.weight"] = state["roi_heads.box_head.0.fc1.bias"] = torch.ones(3)
    (tmp_path / "det").mkdir()
    torch.save({"model": state, "iteration": 7}, tmp_path / TINY.file)
    expert = registry.load("eva02_tiny", weights=tmp_path)
    assert expert.card == TINY.card
    assert expert.card.parameters == sum(leaf.size for leaf in jax.tree.leaves(expert.params))
    back = to_arrays(expert.params, TINY.rules)
    assert back.keys() == {f"backbone.net.{name}" for name in backbone}
    for name, value in backbone.items():
        np.testing.assert_array_equal(back[f"backbone.net.{name}"], value)
    # A backbone that was saved alone.
    save_file(backbone, tmp_path / "alone.safetensors")
    assert registry.load("eva02_tiny", weights=tmp_path / "alone.safetensors").weights_hash == expert.weights_hash


def test_features(tiny, backbone, tmp_path):
    save_file(backbone, tmp_path / "alone.safetensors")
    expert = registry.load("eva02_tiny:96", weights=tmp_path / "alone.safetensors")
    assert (expert.card.view.size, expert.card.grid, expert.card.parameters) == (96, (6, 6), TINY.card.parameters)
    pixels = np.stack([expert.card.view.cut(photographs.chelsea()), expert.card.view.cut(photographs.astronaut())])
    found = jax.jit(expert.apply)(expert.params, pixels)
    assert found.patches.shape == (2, 6, 6, 64) and found.summary is None
    assert np.isfinite(found.patches).all() and np.asarray(found.patches).std() > 0.1
    with pytest.raises(InputError, match="positive multiple of 16, found 100"):
        registry.describe("eva02_tiny:100")


def test_a_wrong_file_is_refused(tiny, backbone, tmp_path):
    wrong = {**backbone, "pos_embed": np.zeros((1, 26, 64), np.float32)}
    del wrong["blocks.3.mlp.w3.bias"]
    save_file(wrong, tmp_path / "wrong.safetensors")
    message = r"missing: backbone.net.blocks.3.mlp.w3.bias.*backbone.net.pos_embed found \(1, 26, 64\)"
    with pytest.raises(InputError, match=message):
        registry.load("eva02_tiny", weights=tmp_path / "wrong.safetensors")
