"""SAM's encoder against transformers' SamVisionModel.

The golden is made by ``python tests/models/test_sam.py`` with torch and transformers importable.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.encoder_rules import ENCODERS, draw_input, draw_weights
from tove_jax.config.schema import MeshConfig
from tove_jax.errors import InputError
from tove_jax.experts.sam import rules
from tove_jax.hf.rules import flatten, to_tree
from tove_jax.models.sam import LOGICAL_AXES, SamEncoder
from tove_jax.parallel import logical_specs, make_mesh, shard_batch, tree_shardings

GOLDEN = ENCODERS / "sam_tiny.npz"
DEPTH, EVERYWHERE, PATCH = 6, (2, 5), 8
MODEL = SamEncoder(
    grid=6,
    width=32,
    depth=DEPTH,
    heads=4,
    mlp_width=64,
    global_layers=EVERYWHERE,
    window=4,
    patch_size=PATCH,
    channels=16,
)
# The published size (windows overhang it), and one that the reference does by resized positions only.
SIZES = {"square": (48, 48), "wide": (40, 64)}
NAMES = ("embeddings", "layers/1", "layers/2", f"layers/{DEPTH - 1}")


def published_shapes():
    shapes = flatten(jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 48, 48, 3)))["params"])
    by_path = {rule.path: rule for rule in rules(DEPTH, EVERYWHERE)}
    return {
        n: by_path[p].published_shape(leaf.shape) for p, leaf in shapes.items() for n in by_path[p].names(leaf.shape)
    }


@pytest.fixture(scope="module")
def params():
    example = jnp.zeros((1, 48, 48, 3))
    shapes = {
        p: leaf.shape for p, leaf in flatten(jax.eval_shape(MODEL.init, jax.random.key(0), example)["params"]).items()
    }
    return jax.tree.map(jnp.asarray, to_tree(draw_weights(published_shapes()), rules(DEPTH, EVERYWHERE), shapes))


def reference(size):
    """Returns the reference's output and layers, channels last, with the weights of the rule."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        image_size=48,
        patch_size=PATCH,
        mlp_dim=64,
        window_size=4,
        global_attn_indexes=EVERYWHERE,
    )
    model = transformers.SamVisionModel(config).eval()
    weights = draw_weights({name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    inner, found = model.vision_encoder, {}
    if size != (48, 48):
        # As ViTDet: the layers resize the tables of distances themselves, the rest is given the other size.
        grid = (size[0] // PATCH, size[1] // PATCH)
        inner.patch_embed.image_size = size
        position = inner.pos_embed.data.permute(0, 3, 1, 2)
        position = torch.nn.functional.interpolate(position, grid, mode="bicubic", align_corners=False)
        inner.pos_embed.data = position.permute(0, 2, 3, 1)
    inner.layers[0].register_forward_pre_hook(lambda module, args: found.update({"embeddings": args[0]}))
    for index, layer in enumerate(inner.layers):
        layer.register_forward_hook(lambda module, args, y, index=index: found.update({f"layers/{index}": y}))
    with torch.no_grad():
        output = model(torch.from_numpy(draw_input(7, (1, 3, *size)))).last_hidden_state
    found = {name: found[name] for name in NAMES}
    return {"output": output.permute(0, 2, 3, 1).numpy(), **{name: value.numpy() for name, value in found.items()}}


@pytest.fixture(scope="module", params=SIZES)
def result(request, params):
    pixels = jnp.asarray(draw_input(7, (1, 3, *SIZES[request.param])).transpose(0, 2, 3, 1))
    output, found = jax.jit(lambda p, x: MODEL.apply({"params": p}, x, intermediates=NAMES))(params, pixels)
    return request.param, {"output": output, **found}


def assert_same(result, expected):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, atol=1e-5, err_msg=name)


def test_equals_transformers(result):
    name, found = result
    assert_same(found, reference(SIZES[name]))


def test_equals_golden(result):
    name, found = result
    with np.load(GOLDEN) as golden:
        assert_same(found, {key: golden[f"{name}/{key}"] for key in found})


@pytest.mark.goldens
def test_golden_is_the_references():
    with np.load(GOLDEN) as golden:
        for name, size in SIZES.items():
            for key, value in reference(size).items():
                np.testing.assert_allclose(golden[f"{name}/{key}"], value, atol=1e-6)


def test_scanned_and_separate_layers_agree(params):
    """Without wanted layers, the two equal groups are one loop; bfloat16 keeps to what its 8 bits allow."""
    pixels = jnp.asarray(draw_input(7, (1, 3, 48, 48)).transpose(0, 2, 3, 1))
    with np.load(GOLDEN) as golden:
        expected = golden["square/output"]
    output, found = jax.jit(lambda p, x: MODEL.apply({"params": p}, x))(params, pixels)
    assert found == {}
    np.testing.assert_allclose(output, expected, atol=1e-5)
    half, _ = jax.jit(lambda p, x: MODEL.clone(dtype=jnp.bfloat16).apply({"params": p}, x))(params, pixels)
    assert half.dtype == jnp.bfloat16
    assert 1e-4 < np.abs(half.astype(jnp.float32) - expected).mean() < 0.02 * np.abs(expected).mean()


def test_sharded_over_a_mesh(params):
    """Batch, widths and heads split over eight devices: the same numbers."""
    pixels = np.repeat(draw_input(7, (1, 3, 48, 48)).transpose(0, 2, 3, 1), 4, axis=0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = tree_shardings(params, logical_specs(params, LOGICAL_AXES, "sam"), mesh)
    split = jax.device_put(params, shardings)
    assert not split["layers"]["global"]["mlp"]["fc1"]["kernel"].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        output, _ = jax.jit(lambda p, x: MODEL.apply({"params": p}, x))(split, shard_batch(pixels, mesh))
    with np.load(GOLDEN) as golden:
        np.testing.assert_allclose(output, np.repeat(golden["square/output"], 4, axis=0), atol=1e-5)


def test_every_parameter_has_logical_axes(params):
    specs = flatten(logical_specs(params, LOGICAL_AXES, "sam"))
    assert specs["layers/windowed/attention/query/kernel"] == ("layers", "embed", "heads")
    assert specs["layers/global/mlp/fc2/kernel"] == ("layers", "mlp", "embed")
    assert specs["layers/global/attention/position/rows"] == ("layers", None, None)
    assert params["layers"]["windowed"]["attention"]["position"]["rows"].shape == (4, 7, 8)
    assert params["layers"]["global"]["attention"]["position"]["rows"].shape == (2, 11, 8)


@pytest.mark.parametrize(
    "shape,names,message",
    [
        ((1, 44, 48, 3), (), r"multiples of 8, found \(1, 44, 48, 3\)"),
        ((1, 48, 48), (), r"expected \(batch, height, width, 3\)"),
        ((1, 48, 48, 3), ("layers/6",), "the encoder has 6 layers"),
        ((1, 48, 48, 3), ("neck",), "expected embeddings, layers/<i>"),
        ((1, 48, 48, 3), ("layers/0/attention_cls",), "the encoder has no class token"),
    ],
)
def test_refusals(params, shape, names, message):
    with pytest.raises(InputError, match=message):
        MODEL.apply({"params": params}, jnp.zeros(shape), intermediates=names)


if __name__ == "__main__":
    arrays = {f"{name}/{key}": value for name, size in SIZES.items() for key, value in reference(size).items()}
    np.savez_compressed(GOLDEN, **arrays)
