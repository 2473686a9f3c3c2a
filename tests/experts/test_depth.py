"""The depth experts: published names, views, and a tiny checkpoint through the registry.

``python -m tests.experts.test_depth`` writes the names and shapes of the references.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from tests.encoder_rules import read_names, write_names
from tests.models.test_dpt import ANYTHING, DPT, published, write_checkpoint
from tove_jax.config import from_file
from tove_jax.errors import InputError
from tove_jax.experts import depth, registry
from tove_jax.hf.rules import to_arrays, to_tree

LEVEL = 1 / 255
UNUSED = ("neck.fusion_stage.layers.0.residual_layer1.", "backbone.embeddings.mask_token")
# transformers 5 renames DINOv2's attention in memory; files keep these names.
SPELLING = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}
# The two versions of Depth Anything have the same names and shapes.
NAMED = {row.card.name: row for row in depth.ROWS if "v2" not in row.card.name}


def reference_names(name: str) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of transformers' state dict, as files spell them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    network = NAMED[name].build(384)
    trunk = {
        "hidden_size": network.backbone["width"],
        "num_hidden_layers": network.backbone["depth"],
        "num_attention_heads": network.backbone["heads"],
    }
    neck = {"neck_hidden_sizes": network.neck_widths, "fusion_hidden_size": network.fusion_width}
    with torch.device("meta"):
        if name == "depth":
            config = transformers.DPTConfig(
                intermediate_size=network.backbone["mlp_width"], backbone_out_indices=network.layers, **trunk, **neck
            )
            model = transformers.DPTForDepthEstimation(config)
        else:
            backbone = transformers.Dinov2Config(
                image_size=518,
                patch_size=14,
                out_indices=[index + 1 for index in network.layers],
                reshape_hidden_states=False,
                **trunk,
            )
            config = transformers.DepthAnythingConfig(
                backbone_config=backbone, reassemble_hidden_size=network.backbone["width"], **neck
            )
            model = transformers.DepthAnythingForDepthEstimation(config)

    def spelled(found: str) -> str:
        return re.sub(r"attention\.([qkvo]_proj)", lambda match: f"attention.{SPELLING[match[1]]}", found)

    return {spelled(found): tuple(value.shape) for found, value in model.state_dict().items()}


@pytest.mark.parametrize("row", depth.ROWS, ids=lambda row: row.card.name)
def test_published_names_and_shapes(row):
    """No name is left over on either side but those that the references hold and do not run."""
    names = read_names("depth_names.json")[row.card.name.replace("_v2", "")]
    assert row.published_shapes() == {name: shape for name, shape in names.items() if not name.startswith(UNUSED)}
    assert all(any(re.fullmatch(pattern, name) for pattern in row.ignore) for name in names if name.startswith(UNUSED))
    assert row.card.parameters == sum(map(math.prod, row.shapes().values()))
    assert row.card == registry.describe(row.card.name)


@pytest.mark.goldens
@pytest.mark.parametrize("name", NAMED)
def test_names_are_the_references(name):
    assert reference_names(name) == read_names("depth_names.json")[name]


def test_rules_go_both_ways():
    for row in (DPT, ANYTHING):
        arrays = published(row)
        back = to_arrays(to_tree(arrays, row.rules, row.shapes(), ignore=row.ignore), row.rules)
        assert back.keys() == row.published_shapes().keys()
        for name, array in back.items():
            np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize(("row", "size", "multiple"), [(DPT, 96, 32), (ANYTHING, 42, 14)], ids=["dpt", "anything"])
def test_a_checkpoint_through_the_registry(row, size, multiple, tmp_path, monkeypatch):
    name = row.card.name
    monkeypatch.setitem(registry._ENTRIES, name, registry.entry(row))
    write_checkpoint(row, tmp_path)
    expert = registry.load(f"{name}:{size}", weights=tmp_path)
    assert expert.card.grid == (size, size) and expert.card.width == 1 and expert.card.view.size == size
    pixels = expert.card.view.cut(photographs.astronaut())[None]
    patches = jax.jit(expert.apply)(expert.params, pixels).patches
    assert patches.shape == (1, size, size, 1) and float(patches.min()) >= 0 and float(patches.std()) > 0
    with pytest.raises(InputError, match=f"expert {name}: size: expected a positive multiple of {multiple}, found 80"):
        registry.load(f"{name}:80", weights=tmp_path)


@pytest.mark.parametrize("name", ["depth", "depth_anything_v2_s"])
def test_view_is_the_references(name):
    """Depth Anything keeps the aspect: its processor's picture holds our square in its middle."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    options = {"size": {"height": 384, "width": 384}, "resample": 2}
    if name != "depth":
        options = {"size": {"height": 518, "width": 518}, "resample": 3, "keep_aspect_ratio": True,
                   "ensure_multiple_of": 14, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # fmt: skip
    # Larger than the network's input, and of an aspect that 14 divides: 518 x 700.
    coffee = Image.fromarray(photographs.coffee()).resize((1200, 800))
    photo = np.asarray(coffee)[:740, :1000]
    processor = transformers.DPTImageProcessorPil(**options)
    expected = processor(photo, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    view = registry.cards()[name].view
    left = (expected.shape[1] - view.size) // 2
    expected = expected[:, left : left + view.size]
    found = view.normalize(view.cut(photo))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() * max(view.std) <= LEVEL


def test_every_expert_of_tove_is_registered():
    """The maps have what its stems take, 1 to 3 channels, at the size of the picture."""
    config = from_file(f"{Path(__file__).parents[2]}/configs/tove_vit_b.py")
    cards = {name: registry.describe(name) for name in config.features.names}
    assert config.method.map_experts == ("depth", "normals", "edges")
    for name in config.method.map_experts:
        assert 1 <= cards[name].width <= 3 and cards[name].grid == (cards[name].view.size,) * 2


def test_licences():
    licences = {row.card.name: row.card.licence for row in depth.ROWS}
    assert licences.pop("depth_anything_v2_b") == licences.pop("depth_anything_v2_l") == "CC-BY-NC-4.0"
    assert set(licences.values()) == {"Apache-2.0"}


if __name__ == "__main__":
    write_names("depth_names.json", {name: reference_names(name) for name in NAMED})
