"""DPT and Depth Anything on tiny networks, against transformers.

The golden holds depths for weights and inputs drawn by the rule of `tests.encoder_rules` (inputs of seed 400);
``python -m tests.models.test_dpt`` makes it with torch and transformers.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.encoder_rules import ENCODERS, draw_input, draw_weights
from tove_jax.errors import InputError
from tove_jax.experts import depth
from tove_jax.hf.rules import to_tree
from tove_jax.models.dpt import LOGICAL_AXES, DepthNetwork, Enlarge
from tove_jax.parallel import logical_specs

GOLDEN = ENCODERS / "dpt.npz"
SIZE = depth.Size((32, 5, 2, 64), (0, 2, 3, 4), (8, 16, 24, 32), 16, 0)
DPT = depth.dpt_row("dpt_tiny", "Tiny DPT", "none", SIZE, pixels=64)
ANYTHING = depth.anything_row("anything_tiny", "Tiny Depth Anything", "none", "none", SIZE, pixels=56)
# Height and width: as published, and others; transformers' DPT itself takes squares alone.
CASES = {"dpt/64": (DPT, (64, 64)), "dpt/96": (DPT, (96, 96)), "anything/56": (ANYTHING, (56, 56)),
         "anything/70_98": (ANYTHING, (70, 98))}  # fmt: skip

NECK = {"neck_hidden_sizes": SIZE.neck, "fusion_hidden_size": SIZE.fusion}
TRUNK = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
CONFIGS = {
    "dpt_tiny": {"model_type": "dpt", "image_size": 64, "patch_size": 16, "intermediate_size": 64, **TRUNK, **NECK,
                 "backbone_out_indices": SIZE.layers},
    "anything_tiny": {"model_type": "depth_anything", "patch_size": 14, "reassemble_hidden_size": 32, **NECK,
                      "backbone_config": {"model_type": "dinov2", "image_size": 56, "patch_size": 14, "mlp_ratio": 2,
                                          "out_indices": [index + 1 for index in SIZE.layers],
                                          "reshape_hidden_states": False, **TRUNK}},
}  # fmt: skip


def published(row) -> dict[str, np.ndarray]:
    """Returns a checkpoint as published, with the arrays that are never used."""
    shapes = row.published_shapes()
    prefix = "neck.fusion_stage.layers.0.residual_layer"
    unused = {name.replace(f"{prefix}2", f"{prefix}1"): shapes[name] for name in shapes if name.startswith(prefix)}
    return draw_weights({**shapes, **unused})


def pixels_of(shape) -> np.ndarray:
    return draw_input(400, (1, 3, *shape))


def write_checkpoint(row, folder: Path) -> None:
    mask = {} if row is DPT else {"backbone.embeddings.mask_token": np.zeros((1, 32), np.float32)}
    save_file({**published(row), **mask}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[row.card.name]))


def reference(row, shape) -> np.ndarray:
    """Returns transformers' depth, float32 (1, H, W)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(row, Path(folder))
        network, report = transformers.AutoModelForDepthEstimation.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        return network.eval()(torch.tensor(pixels_of(shape))).predicted_depth.numpy()


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.goldens
@pytest.mark.parametrize("case", CASES)
def test_golden_is_the_reference(case, golden):
    np.testing.assert_allclose(golden[case], reference(*CASES[case]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_golden(case, golden):
    row, shape = CASES[case]
    tree = to_tree(published(row), row.rules, row.shapes(), ignore=row.ignore)
    network = row.build(shape[0])
    if row.adapt is not None:
        tree = row.adapt(tree, network)
    found = jax.jit(network.apply)({"params": tree}, pixels_of(shape).transpose(0, 2, 3, 1))[0]
    assert found.shape == (1, *shape, 1)
    wanted = golden[case]
    assert wanted.std() > 0.01 and (wanted > 0).mean() > 0.2  # numbers that could differ
    np.testing.assert_allclose(found[..., 0], wanted, atol=1e-5 * wanted.max(), rtol=1e-5)


def test_positions_are_resized_as_torch_does():
    torch = pytest.importorskip("torch")
    table = np.random.RandomState(0).standard_normal((17, 6)).astype(np.float32)
    grid = torch.from_numpy(table[1:].reshape(1, 4, 4, 6)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(7, 3), mode="bilinear").permute(0, 2, 3, 1).reshape(-1, 6)
    found = depth.resize_bilinear(table, (7, 3))
    np.testing.assert_allclose(found[1:], expected, atol=1e-6)
    np.testing.assert_array_equal(found[0], table[0])


def test_every_pixel_becomes_a_square():
    torch = pytest.importorskip("torch")
    x = np.random.RandomState(0).standard_normal((2, 3, 5, 4)).astype(np.float32)
    params = Enlarge(2).init(jax.random.key(0), x)["params"]
    kernel = np.asarray(params["kernel"]).transpose(0, 3, 1, 2)
    expected = torch.nn.functional.conv_transpose2d(
        torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(kernel.copy()), stride=2
    )
    np.testing.assert_allclose(Enlarge(2).apply({"params": params}, x), expected.permute(0, 2, 3, 1), atol=1e-5)


def test_intermediates_and_axes():
    network = DPT.build(64)
    shape = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    names = ("fused", "layers/1", "pooled")
    (result, found), variables = jax.eval_shape(
        lambda x: network.init_with_output(jax.random.key(0), x, intermediates=names), shape
    )
    assert result.shape == (2, 64, 64, 1) and sorted(found) == sorted(names)
    assert found["fused"].shape == (2, 32, 32, 16) and found["layers/1"].shape == (2, 17, 32)
    specs = logical_specs(variables["params"], LOGICAL_AXES, "t")
    assert specs["readout0"]["kernel"] == (None, "embed") and specs["head3"]["bias"] == (None,)
    assert specs["backbone"]["layers"]["mlp"]["fc1"]["kernel"] == ("layers", "embed", "mlp")
    plain = jax.eval_shape(lambda x: network.init(jax.random.key(0), x), shape)["params"]
    assert jax.tree.structure(plain) == jax.tree.structure(variables["params"])
    half = network.clone(dtype=jnp.bfloat16)
    assert jax.eval_shape(half.apply, variables, shape)[0].dtype == jnp.bfloat16


def test_wrong_requests_are_refused():
    for shape, names, message in (
        ((1, 40, 64, 3), (), r"pixels: expected .* multiples of 16, found \(1, 40, 64, 3\)"),
        ((1, 64, 64, 3), ("depth",), "intermediate 'depth': expected"),
    ):
        with pytest.raises(InputError, match=message):
            jax.eval_shape(
                lambda x, names=names: DPT.build(64).init(jax.random.key(0), x, intermediates=names),
                jax.ShapeDtypeStruct(shape, jnp.float32),
            )


def test_published_layers():
    """The second version spreads the layers that the first takes from the end."""
    layers = {row.card.name: row.build(row.card.view.size).layers for row in depth.ROWS}
    assert layers["depth"] == (5, 11, 17, 23)
    assert layers["depth_anything_s"] == layers["depth_anything_b"] == (8, 9, 10, 11)
    assert layers["depth_anything_l"] == (20, 21, 22, 23)
    assert layers["depth_anything_v2_s"] == layers["depth_anything_v2_b"] == (2, 5, 8, 11)
    assert layers["depth_anything_v2_l"] == (4, 11, 17, 23)
    assert all(isinstance(row.build(row.card.view.size), DepthNetwork) for row in depth.ROWS)
    assert all(math.prod(row.card.grid) == row.card.view.size**2 for row in depth.ROWS)


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **{case: reference(row, shape) for case, (row, shape) in CASES.items()})
