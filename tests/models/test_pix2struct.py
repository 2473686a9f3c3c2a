"""Pix2Struct's encoder, its standardisation and its patches against transformers'.

The golden is made by ``python -m tests.models.test_pix2struct`` with torch and transformers importable.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import data as photographs

from tests.encoder_rules import ENCODERS, draw_weights
from tove_jax.config.schema import MeshConfig
from tove_jax.errors import InputError
from tove_jax.experts.pix2struct import RULES
from tove_jax.hf.rules import flatten, to_arrays, to_tree
from tove_jax.models.pix2struct import LOGICAL_AXES, Pix2StructEncoder, patch_grid, render, standardise
from tove_jax.parallel import logical_specs, make_mesh, shard_batch, tree_shardings

GOLDEN = ENCODERS / "pix2struct_tiny.npz"
NETWORK = Pix2StructEncoder(width=32, depth=3, heads=4, mlp_width=48, positions=16)
# Cut-outs of a photograph (height, width), and the patches allowed: shrunk, and enlarged.
CASES = {"wide": (400, 600, 15), "tall": (50, 31, 12)}
NAMES = ("embeddings", "layers/0", "layers/-1")


def picture(case):
    height, width, _ = CASES[case]
    return photographs.coffee()[:height, :width]


def processor():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers").Pix2StructImageProcessorPil()


def reference_model():
    """Returns transformers' model with the weights of the rule."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Pix2StructVisionConfig(
        hidden_size=32, d_ff=48, d_kv=8, num_attention_heads=4, num_hidden_layers=3, seq_len=16
    )
    model = transformers.Pix2StructVisionModel(config).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.tensor(array) for name, array in draw_weights(shapes).items()})
    return model, shapes


def reference():
    """Returns transformers' numbers for every case, padding cut off, and shapes by published name."""
    torch = pytest.importorskip("torch")
    model, shapes = reference_model()
    found = {}
    for case, (_, _, budget) in CASES.items():
        inputs = processor()(picture(case), return_tensors="pt", max_patches=budget)
        count = int(inputs["attention_mask"].sum())
        assert count < budget  # there is padding
        with torch.no_grad():
            outputs = model(**inputs, output_hidden_states=True)
        hidden = (outputs.hidden_states[0], outputs.hidden_states[1], outputs.hidden_states[-1])
        parts = dict(zip((*NAMES, "tokens"), (*hidden, outputs.last_hidden_state), strict=True))
        parts["patches"] = inputs["flattened_patches"][..., :50]
        found |= {f"{case}/{name}": part[0, :count].numpy() for name, part in parts.items()}
    return found, shapes


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def abstract():
    tree = jax.eval_shape(NETWORK.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    shapes = {path: leaf.shape for path, leaf in flatten(tree).items()}
    by_path = {rule.path: rule for rule in RULES}
    return tree, shapes, {n: by_path[p].published_shape(s) for p, s in shapes.items() for n in by_path[p].names(s)}


@pytest.mark.goldens
def test_golden_is_the_reference(golden) -> None:
    found, shapes = reference()
    assert shapes == abstract()[2]
    assert found.keys() == golden.keys()
    for name, values in found.items():
        np.testing.assert_allclose(golden[name], values, atol=1e-5)


def test_equals_the_golden(golden) -> None:
    _, shapes, names = abstract()
    weights = draw_weights(names)
    params = to_tree(weights, RULES, shapes)
    back = to_arrays(params, RULES)
    assert back.keys() == weights.keys() and all(np.array_equal(back[name], weights[name]) for name in weights)

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, picture, grid):
        x = render(standardise(picture), grid)
        return x, *NETWORK.apply({"params": params}, x, intermediates=NAMES)

    for case, (height, width, budget) in CASES.items():
        grid = patch_grid(height, width, budget)
        x, tokens, found = run(params, picture(case)[None], grid)
        assert tokens.shape == (1, *grid, 32) and found.keys() == set(NAMES)
        patches = np.asarray(x).reshape(grid[0], 16, grid[1], 16, 3).swapaxes(1, 2).reshape(-1, 768)
        expected = golden[f"{case}/patches"]
        places = [[row + 1, column + 1] for row in range(grid[0]) for column in range(grid[1])]
        np.testing.assert_array_equal(expected[:, :2], places)
        np.testing.assert_allclose(patches[:, :48], expected[:, 2:], atol=1e-5)
        for name, values in (*found.items(), ("tokens", tokens)):
            np.testing.assert_allclose(values.reshape(-1, 32), golden[f"{case}/{name}"], atol=2e-5, err_msg=name)


def test_standardised_like_the_processor() -> None:
    photo = photographs.chelsea()
    found = np.asarray(standardise(jnp.asarray(np.stack([photo, np.full_like(photo, 7)]))))
    np.testing.assert_allclose(found[0], processor().normalize(photo.transpose(2, 0, 1)).transpose(1, 2, 0), atol=1e-5)
    np.testing.assert_allclose([found[0].mean(), found[0].std()], [0, 1], atol=1e-5)
    np.testing.assert_array_equal(found[1], 0)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((1024, 1024, 2048), (45, 45)), ((400, 600, 15), (3, 4)), ((1, 900, 12), (1, 12)), ((9, 9, 1), (1, 1))],
)
def test_patch_grid(size, grid) -> None:
    assert patch_grid(*size) == grid
    assert grid[0] * grid[1] <= size[2]


def test_layers_nobody_asked_for_are_not_run() -> None:
    tree, *_ = abstract()
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tree)
    broken = jax.tree.map(lambda leaf: np.concatenate([leaf[:1], leaf[1:] * np.nan]), params["layers"])
    params = {name: leaf for name, leaf in params.items() if name != "norm"} | {"layers": broken}
    x = np.ones((1, 32, 16, 3), np.float32)
    tokens, found = NETWORK.apply({"params": params}, x, intermediates=("layers/0",), final=False)
    assert tokens is None and found["layers/0"].shape == (1, 2, 1, 32)
    assert np.isfinite(found["layers/0"]).all()


def test_every_parameter_has_axes() -> None:
    specs = logical_specs(abstract()[0], LOGICAL_AXES, "Pix2Struct")
    assert specs["layers"]["mlp"]["gate"]["kernel"] == ("layers", "embed", "mlp")
    assert specs["patch_embed"]["kernel"] == ("patch", "embed")


def test_sharded_over_a_mesh(golden) -> None:
    """Batch, widths and heads split over eight devices: the same numbers."""
    _, shapes, names = abstract()
    params = to_tree(draw_weights(names), RULES, shapes)
    height, width, budget = CASES["tall"]
    grid = patch_grid(height, width, budget)
    x = np.asarray(render(standardise(jnp.asarray(picture("tall")[None])), grid))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = jax.device_put(params, tree_shardings(params, logical_specs(params, LOGICAL_AXES, "Pix2Struct"), mesh))
    assert not split["layers"]["mlp"]["fc1"]["kernel"].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        run = jax.jit(lambda params, x: NETWORK.apply({"params": params}, x))
        tokens, _ = run(split, shard_batch(np.repeat(x, 4, axis=0), mesh))
    expected = np.broadcast_to(golden["tall/tokens"].reshape(1, *grid, 32), tokens.shape)
    np.testing.assert_allclose(tokens, expected, atol=2e-5)


def test_refusals() -> None:
    x = np.zeros((1, 32, 32, 3), np.float32)
    params = {"params": {}}
    with pytest.raises(InputError, match=r"multiples of 16 pixels, found \(1, 30, 32, 3\)"):
        NETWORK.apply(params, x[:, :30])
    with pytest.raises(InputError, match="fewer than 16 patches a side"):
        NETWORK.apply(params, np.zeros((1, 16, 256, 3), np.float32))
    with pytest.raises(InputError, match="'layers/3': the encoder has 3 layers"):
        NETWORK.apply(params, x, intermediates=("layers/3",))
    with pytest.raises(InputError, match="has no CLS"):
        NETWORK.apply(params, x, intermediates=("layers/0/attention_cls",))


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **reference()[0])
