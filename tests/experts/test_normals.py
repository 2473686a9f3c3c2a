"""NLL-AngMF as an expert: published names, view, maps."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.encoder_rules import read_names
from tove_jax.errors import InputError
from tove_jax.experts import normals, registry
from tove_jax.hf.folding import unfolded_shapes
from tove_jax.hf.rules import unflatten

ROW = normals.ROWS[0]
NAMES = read_names("nll_angmf_names.json")["nll_angmf"]


def test_published_names_and_shapes():
    """All but the norm after the encoder's last convolution, which the decoder passes by."""
    used = {name: shape for name, shape in NAMES.items() if not name.startswith("encoder.original_model.bn2.")}
    found = unfolded_shapes(ROW.published_shapes(), normals.ENCODER_PAIRS, biased=False)
    assert unfolded_shapes(found, normals.DECODER_PAIRS, biased=True) == used
    assert sum(int(np.prod(shape)) for shape in ROW.shapes().values()) == ROW.card.parameters


def test_card_and_maps_at_another_size():
    card = registry.describe("normals:64")
    assert (card.grid, card.width, card.view.size, card.parameters) == ((64, 64), 3, 64, ROW.card.parameters)
    tree = unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in ROW.shapes().items()})
    pixels = jax.ShapeDtypeStruct((2, 64, 64, 3), np.float32)
    kappa = jax.eval_shape(lambda p, x: ROW.extras["concentration"](ROW.build(64), p, x), tree, pixels)
    assert kappa.shape == (2, 64, 64)
    with pytest.raises(InputError, match="normals: size: expected a positive multiple of 32, found 72"):
        registry.describe("normals:72")


def test_missing_arrays_are_named():
    arrays = {f"module.{name}": np.ones(shape, np.float32) for name, shape in NAMES.items() if np.prod(shape) < 5000}
    with pytest.raises(
        InputError, match=r"NLL-AngMF: \d+ arrays are missing: encoder.original_model.blocks.1.0.conv_pwl"
    ):
        ROW.canonical(arrays)


def test_the_view_is_the_published_one():
    view = ROW.card.view
    pixels = np.array([[[[10, 20, 30]]]], np.uint8)
    expected = (np.array([10, 20, 30]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(view.normalize(pixels)[0, 0, 0], expected, atol=1e-5)
    assert (view.size, view.interpolation, ROW.card.grid) == (480, "bilinear", (480, 480))
