"""The SAM experts: published names, the view, and a tiny checkpoint through the registry."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from skimage import data as photographs

from tests.encoder_rules import draw_weights, read_names
from tove_jax.errors import InputError
from tove_jax.experts import registry, sam
from tove_jax.hf.rules import to_arrays

LEVEL = 1 / 255
TINY = sam.row(sam.Size("sam_tiny", "Tiny SAM", "none", 32, 3, 2, (1,), 664_224), pixels=64)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(registry._ENTRIES, "sam_tiny", registry.entry(TINY))


@pytest.fixture(scope="module")
def arrays():
    weights = draw_weights(TINY.published_shapes())
    return weights | {"mask_decoder.iou_token.weight": np.ones((1, 4), np.float32)}


def picture(tall: bool) -> np.ndarray:
    cat = photographs.chelsea()
    return np.ascontiguousarray(cat.swapaxes(0, 1) if tall else cat)


@pytest.mark.parametrize("row", sam.ROWS, ids=lambda row: row.card.name)
def test_published_names_and_shapes(row):
    assert row.published_shapes() == read_names("sam_names.json")[row.card.name]
    assert row.card.parameters == sum(map(math.prod, row.shapes().values()))
    assert row.card == registry.describe(row.card.name)


@pytest.mark.goldens
@pytest.mark.parametrize("size", sam.SIZES, ids=lambda size: size.name)
def test_names_are_the_references(size):
    """The whole SamModel: beside the vision encoder's names there are only those left out on purpose."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    vision = {
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "global_attn_indexes": size.global_layers,
    }
    with torch.device("meta"):
        state = transformers.SamModel(transformers.SamConfig(vision_config=vision)).state_dict()
    ours = {name: tuple(value.shape) for name, value in state.items() if name.startswith("vision_encoder.")}
    assert ours == read_names("sam_names.json")[size.name]
    others = {name.split(".")[0] for name in state} - {"vision_encoder"}
    assert others == {"prompt_encoder", "mask_decoder", "shared_image_embedding"}


@pytest.mark.parametrize("tall", [False, True])
def test_view_is_the_references(tall):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    view = registry.cards()["sam_l"].view
    processor = transformers.SamImageProcessorPil()
    expected = processor(picture(tall), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    found = np.asarray(sam.zero_padding(view.normalize(view.cut(picture(tall)))[None], view)[0])
    padding = (expected == 0).all(-1)
    assert 0.3 < padding.mean() < 0.4
    assert not found[padding].any()
    assert np.abs(found - expected).max() * max(view.std) <= LEVEL


def test_padding_alone_is_set_to_zero():
    """A stripe of the padding's colour inside the picture is left as it is; a small picture is padded on one side."""
    view = TINY.card.view
    image = np.full((32, 64, 3), 200, np.uint8)
    image[10] = (124, 116, 104)
    pixels = view.normalize(view.cut(image))[None]
    found = np.asarray(sam.zero_padding(pixels, view))
    assert np.abs(pixels[:, 32:]).max() > 0 and not found[:, 32:].any()
    np.testing.assert_array_equal(found[:, :32], pixels[:, :32])
    full = view.normalize(np.full((1, 64, 64, 3), 200, np.uint8))
    np.testing.assert_array_equal(sam.zero_padding(full, view), full)


def original(name: str) -> str:
    """Returns segment-anything's own name, written a second time."""
    parts = name.replace("vision_encoder.", "image_encoder.").replace("projection", "proj").split(".")
    if parts[1] == "layers":
        parts[1] = "blocks"
        parts[3] = parts[3].replace("layer_norm", "norm")
    if parts[1] == "neck":
        parts[2] = str(["conv1", "layer_norm1", "conv2", "layer_norm2"].index(parts[2]))
    return ".".join(parts)


def test_loads_both_spellings(tiny, arrays, tmp_path):
    save_file(arrays, tmp_path / "model.safetensors")
    spelled = {original(name) if name.startswith("vision") else name: value for name, value in arrays.items()}
    assert "image_encoder.blocks.2.norm1.weight" in spelled and "image_encoder.neck.3.bias" in spelled
    save_file(spelled, tmp_path / "original.safetensors")
    one = registry.load("sam_tiny", weights=tmp_path)
    other = registry.load("sam_tiny", weights=tmp_path / "original.safetensors")
    assert one.card == TINY.card and one.weights_hash == other.weights_hash
    assert one.card.parameters == sum(leaf.size for leaf in jax.tree.leaves(one.params))
    back = to_arrays(one.params, TINY.rules)
    assert back.keys() == arrays.keys() - {"mask_decoder.iou_token.weight"}
    for name, value in back.items():
        np.testing.assert_array_equal(value, arrays[name])


def test_a_missing_layer_is_named(tiny, arrays, tmp_path):
    save_file({n: a for n, a in arrays.items() if ".1.attn.qkv.bias" not in n}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing: vision_encoder.layers.1.attn.qkv.bias \(96,\)"):
        registry.load("sam_tiny", weights=tmp_path)


def test_equals_transformers_on_a_photograph(tiny, arrays, tmp_path):
    """A whole SamModel written by transformers; picture, processor and encoder of the reference."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "global_attn_indexes": (1,),
        "image_size": 64,
    }
    prompt = {"image_size": 64}
    model = transformers.SamModel(transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt)).eval()
    own = {name: torch.from_numpy(value) for name, value in arrays.items() if name.startswith("vision")}
    missing, unknown = model.load_state_dict(own, strict=False)
    assert not unknown and not [name for name in missing if name.startswith("vision")]
    model.save_pretrained(tmp_path)
    processor = transformers.SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    pixels = processor(picture(False), return_tensors="np")["pixel_values"]
    with torch.no_grad():
        expected = model.vision_encoder(torch.from_numpy(pixels)).last_hidden_state.permute(0, 2, 3, 1).numpy()
    expert = registry.load("sam_tiny", weights=tmp_path)
    found = jax.jit(expert.apply)(expert.params, expert.card.view.cut(picture(False))[None])
    assert found.patches.shape == (1, 4, 4, 256) and found.summary is None
    np.testing.assert_allclose(found.patches, expected, atol=2e-5)


def test_another_size_and_half_precision(tiny, arrays, tmp_path):
    save_file(arrays, tmp_path / "model.safetensors")
    expert = registry.load("sam_tiny:96", weights=tmp_path, dtype="bfloat16")
    assert expert.card.grid == (6, 6) and expert.card.parameters == TINY.card.parameters
    found = jax.eval_shape(expert.apply, expert.params, np.zeros((2, 96, 96, 3), np.uint8))
    assert found.patches.shape == (2, 6, 6, 256) and found.patches.dtype == jax.numpy.bfloat16
    with pytest.raises(InputError, match="positive multiple of 16, found 90"):
        registry.describe("sam_tiny:90")
