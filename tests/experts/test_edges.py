"""DexiNed as an expert: published names, view, weights through the registry, what ToVE's stem reads."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from skimage import data as photographs

from tests.encoder_rules import draw_weights, read_names
from tove_jax.errors import InputError
from tove_jax.experts import edges, registry
from tove_jax.hf.folding import unfolded_shapes
from tove_jax.hf.rules import to_arrays, to_tree

ROW = edges.ROWS[0]
NAMES = read_names("dexined_names.json")["dexined"]
# The fifth skip connection and the norm of the fusion, which the released network holds and does not run.
UNUSED = ("side_5.", "block_cat.bn.")


@pytest.fixture(scope="module")
def arrays():
    return draw_weights(NAMES)


def test_published_names_and_shapes():
    used = {name: shape for name, shape in NAMES.items() if not name.startswith(UNUSED)}
    assert unfolded_shapes(ROW.published_shapes(), edges.PAIRS, biased=True) == used
    assert sum(int(np.prod(shape)) for shape in ROW.shapes().values()) == ROW.card.parameters


def test_rules_go_both_ways(arrays):
    folded = ROW.canonical(arrays)
    back = to_arrays(to_tree(folded, ROW.rules, ROW.shapes(), ignore=ROW.ignore), ROW.rules)
    assert back.keys() == ROW.published_shapes().keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, folded[name])


def test_through_the_registry(arrays, tmp_path):
    """From a file as a parallel run leaves it to maps of the size of the view, in [0, 1]."""
    saved = {f"module.{name}": array for name, array in arrays.items()}
    saved["module.block_1.bn1.num_batches_tracked"] = np.array(7)
    save_file(saved, tmp_path / "model.safetensors")
    expert = registry.load("edges:32", weights=tmp_path)
    assert expert.card.grid == (32, 32) and expert.card.width == 1 and expert.card.view.size == 32
    pixels = expert.card.view.cut(photographs.astronaut())[None]

    def run(params, pixels):
        return expert.apply(params, pixels).patches, expert.extras["sides"](params, pixels)

    patches, sides = jax.jit(run)(expert.params, pixels)
    assert patches.shape == (1, 32, 32, 1) and sides.shape == (1, 6, 32, 32)
    for maps in (patches, sides):
        assert float(maps.min()) >= 0 and float(maps.max()) <= 1 and float(maps.std()) > 0
    wrong = {name: array for name, array in saved.items() if name != "module.dblock_4.denselayer2.norm1.weight"}
    save_file(wrong, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="1 arrays are missing: dblock_4.denselayer2.norm1.weight"):
        registry.load("edges", weights=tmp_path)
    with pytest.raises(InputError, match="edges: size: expected a positive multiple of 16, found 40"):
        registry.load("edges:40", weights=tmp_path)


def test_the_view_is_the_published_one():
    """Blue first, less the mean, values up to 255, scaled bilinearly."""
    view = ROW.card.view
    pixels = np.array([[[[10, 20, 30]]]], np.uint8)
    np.testing.assert_allclose(view.normalize(pixels)[0, 0, 0], [30 - 103.939, 20 - 116.779, 10 - 123.68], atol=1e-4)
    assert (view.size, view.interpolation, ROW.card.grid) == (512, "bilinear", (512, 512))
