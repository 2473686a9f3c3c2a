"""The Pix2Struct experts: published names, the processor's patches of the published view, and the whole road.

Published names and shapes are written by ``python -m tests.experts.test_pix2struct`` with torch and transformers
importable.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from skimage import data as photographs

from tests.encoder_rules import ENCODERS, draw_weights, read_names, write_names
from tests.experts.test_convnext import whole
from tests.models.test_pix2struct import NETWORK, processor, reference_model
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import pix2struct, registry
from tove_jax.models.pix2struct import patch_grid, render, standardise

NAMES = "pix2struct_names.json"
GOLDEN = ENCODERS / "pix2struct_expert.npz"
ROWS = {row.card.name: row for row in pix2struct.ROWS}
SIZE = 96


def reference_names(name):
    """Returns names and shapes of the whole published model but its decoder."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    module = ROWS[name].build(1024)
    options = {"hidden_size": module.width, "d_ff": module.mlp_width}
    config = transformers.Pix2StructConfig(
        vision_config=options | {"num_hidden_layers": module.depth, "num_attention_heads": module.heads},
        text_config=options | {"num_layers": 1, "num_heads": module.heads},
    )
    with torch.device("meta"):
        model = transformers.Pix2StructForConditionalGeneration(config)
    found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert any(key.startswith("decoder.") for key in found)
    return {key: shape for key, shape in found.items() if not key.startswith("decoder.")}


def picture():
    """Returns the golden's picture, uint8 (1, 96, 96, 3)."""
    return View(SIZE).cut(photographs.coffee())[None]


def reference():
    """Returns transformers' features of `picture`, resized as MoVE-KD does: (3, 3, 32)."""
    torch = pytest.importorskip("torch")
    inputs = processor()(picture()[0], return_tensors="pt", max_patches=18)
    with torch.no_grad():
        tokens = reference_model()[0](**inputs).last_hidden_state[:, :16]
        maps = tokens.transpose(1, 2).reshape(1, 32, 4, 4)
        maps = torch.nn.functional.interpolate(maps, size=(3, 3), mode="bilinear", align_corners=True)
    return maps[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", ROWS)
def test_published_names_as_kept(name) -> None:
    row, published = ROWS[name], read_names(NAMES)[name]
    assert row.canonical(dict(published)) == row.published_shapes()
    assert row.canonical(row.published_shapes()) == row.published_shapes()  # the encoder alone is taken too


@pytest.mark.goldens
@pytest.mark.parametrize("name", ROWS)
def test_published_names_of_the_reference(name) -> None:
    assert read_names(NAMES)[name] == reference_names(name)


@pytest.mark.goldens
def test_golden_is_the_reference() -> None:
    with np.load(GOLDEN) as file:
        np.testing.assert_allclose(file["patches"], reference(), atol=1e-5)


def test_cards_are_the_networks() -> None:
    for name, row in ROWS.items():
        assert row.card.parameters == sum(int(np.prod(shape)) for shape in row.shapes().values())
        assert registry.cards()[name] == row.card
        assert (row.card.grid, row.card.width) == ((32, 32), row.build(1024).width)
        assert whole(row) == ((1, 32, 32, row.card.width), None)
    card = registry.describe("pix2struct_b:512")
    assert (card.view.size, card.grid, card.parameters) == (512, (16, 16), ROWS["pix2struct_b"].card.parameters)
    with pytest.raises(InputError, match="pix2struct_l: size: expected a positive multiple of 32, found 100"):
        registry.describe("pix2struct_l:100")


def test_patches_of_the_published_view_are_the_processors() -> None:
    view = ROWS["pix2struct_l"].card.view
    cut = view.cut(photographs.coffee())
    levels = view.normalize(cut)
    np.testing.assert_array_equal(levels, cut)
    inputs = processor()(cut, return_tensors="np")  # 2048 patches, as published
    grid = patch_grid(1024, 1024, pix2struct.MAX_PATCHES)
    assert grid == (45, 45) and int(inputs["attention_mask"].sum()) == 2025
    found = np.asarray(render(standardise(jnp.asarray(levels[None])), grid))
    patches = found.reshape(45, 16, 45, 16, 3).swapaxes(1, 2).reshape(2025, 768)
    np.testing.assert_allclose(patches, inputs["flattened_patches"][0, :2025, 2:], atol=1e-4)


def test_equals_the_golden(tmp_path) -> None:
    row = ROWS["pix2struct_l"]
    card = dataclasses.replace(row.card, view=dataclasses.replace(row.card.view, size=2 * SIZE))
    row = dataclasses.replace(row, card=card, build=lambda size: NETWORK)
    weights = draw_weights(row.published_shapes())
    arrays = {f"encoder.{name}": array for name, array in weights.items()}
    save_file(arrays | {"decoder.lm_head.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    expert = row.load(weights=tmp_path, size=SIZE)
    features = expert.apply(expert.params, picture())
    assert features.patches.shape == (1, 3, 3, 32) and features.summary is None
    with np.load(GOLDEN) as file:
        np.testing.assert_allclose(features.patches[0], file["patches"], atol=2e-5)
    half = row.load(weights=tmp_path, size=SIZE, dtype="bfloat16")
    rough = half.apply(half.params, picture()).patches
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(np.float32), features.patches, atol=0.2)

    save_file(arrays | {"encoder.pooler.weight": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 not known: pooler.weight"):
        row.load(weights=tmp_path)


if __name__ == "__main__":
    write_names(NAMES, {name: reference_names(name) for name in ROWS})
    np.savez_compressed(GOLDEN, patches=reference())
