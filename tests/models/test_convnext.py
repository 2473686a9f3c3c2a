"""ConvNeXt and ConvNeXt-V2 against transformers' and timm's.

The golden is made by ``python -m tests.models.test_convnext`` with torch, transformers and timm (Apache-2.0;
``pip install --no-deps timm torchvision``) importable; without timm, the test that regenerates leaves its part out.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.encoder_rules import ENCODERS, draw_input, draw_weights
from tove_jax.config.schema import MeshConfig
from tove_jax.errors import InputError
from tove_jax.experts.convnext import RULES, TIMM_RULES
from tove_jax.hf.rules import flatten, to_arrays, to_tree, unflatten
from tove_jax.models.convnext import LOGICAL_AXES, ConvNeXt, ResponseNorm
from tove_jax.parallel import logical_specs, make_mesh, shard_batch, tree_shardings

GOLDEN = ENCODERS / "convnext_tiny.npz"
WIDTHS, DEPTHS = (8, 16, 24, 40), (1, 2, 3, 2)
SIZES = {"wide": (64, 96), "odd": (70, 50)}
NETWORKS = {
    "v1": (RULES, ConvNeXt(WIDTHS, DEPTHS, depthwise="grouped")),
    "v2": (RULES, ConvNeXt(WIDTHS, DEPTHS, response_norm=True, depthwise="grouped")),
    "timm": (TIMM_RULES, ConvNeXt(WIDTHS, DEPTHS, norm_epsilon=1e-5, final_epsilon=1e-5, depthwise="grouped")),
    "timm_v2": (TIMM_RULES, ConvNeXt(WIDTHS, DEPTHS, response_norm=True, final_epsilon=1e-6, depthwise="grouped")),
}
TINY = ConvNeXt((8,), (2,), response_norm=True)
NAMES = ("stem", "stages/1", "stages/-1", "pooled")


def pixels(size):
    return draw_input(SIZES[size][0], (2, 3, *SIZES[size]))


def kept(values):
    """Returns what the golden keeps: of the large maps, some channels."""
    return values[..., :3] if values.size > 2_000 else values


@functools.cache
def mend_torchvision():
    """Declares the operators that torchvision, which timm wants, misses in a torch without them."""
    torch = pytest.importorskip("torch")
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return library  # it lives as long as this object


def reference_model(kind):
    """Returns the torch model and a function from its input to the maps that `NAMES` calls."""
    mend_torchvision()
    if kind.startswith("timm"):
        pytest.importorskip("timm")
        from timm.models.convnext import ConvNeXt as Timm

        options = {"use_grn": True, "ls_init_value": None} if kind == "timm_v2" else {"norm_eps": 1e-5}
        model = Timm(depths=DEPTHS, dims=WIDTHS, num_classes=0, **options).eval()

        def run(x):
            maps = [model.stem(x)]
            for stage in model.stages:
                maps.append(stage(maps[-1]))
            return maps[0], maps[2], model.forward_features(x), model.forward_head(maps[4])

        return model, run
    transformers = pytest.importorskip("transformers")
    name = "ConvNextV2" if kind == "v2" else "ConvNext"
    config = getattr(transformers, f"{name}Config")(hidden_sizes=WIDTHS, depths=DEPTHS)
    model = getattr(transformers, f"{name}Model")(config).eval()

    def run(x):
        found = model(x, output_hidden_states=True)
        return found.hidden_states[0], found.hidden_states[2], found.last_hidden_state, found.pooler_output

    return model, run


def reference(kind):
    """Returns the torch numbers of one network at both sizes, channels last, and shapes by published name."""
    torch = pytest.importorskip("torch")
    model, run = reference_model(kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.tensor(array) for name, array in draw_weights(shapes).items()})
    found = {}
    for size in SIZES:
        with torch.no_grad():
            outputs = run(torch.tensor(pixels(size)))
        for name, output in zip(NAMES, outputs, strict=True):
            values = output.numpy()
            found[f"{kind}/{size}/{name}"] = kept(values.transpose(0, 2, 3, 1) if values.ndim == 4 else values)
    return found, shapes


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def published(kind):
    rules, network = NETWORKS[kind]
    tree = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    shapes = {path: leaf.shape for path, leaf in flatten(tree).items()}
    by_path = {rule.path: rule for rule in rules}
    names = {n: by_path[p].published_shape(s) for p, s in shapes.items() for n in by_path[p].names(s)}
    return shapes, names


@pytest.mark.goldens
@pytest.mark.parametrize("kind", NETWORKS)
def test_golden_is_the_reference(kind, golden) -> None:
    found, shapes = reference(kind)
    assert shapes == published(kind)[1]
    for name, values in found.items():
        np.testing.assert_allclose(golden[name], values, atol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_equals_the_golden(kind, golden) -> None:
    rules, network = NETWORKS[kind]
    shapes, names = published(kind)
    weights = draw_weights(names)
    params = to_tree(weights, rules, shapes)
    back = to_arrays(params, rules)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], weights[name]) for name in weights)

    run = jax.jit(lambda params, x: network.apply({"params": params}, x, intermediates=NAMES))
    for size in SIZES:
        last, found = run(params, pixels(size).transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(last, found["stages/-1"])
        assert found.keys() == set(NAMES)
        for name in NAMES:
            np.testing.assert_allclose(kept(found[name]), golden[f"{kind}/{size}/{name}"], atol=1e-5)
    assert golden[f"{kind}/wide/pooled"].std() > 0.1  # numbers that could differ


def test_stages_nobody_asked_for_are_not_run() -> None:
    rules, network = NETWORKS["v1"]
    shapes, names = published("v1")
    params = to_tree(draw_weights(names), rules, shapes)
    part = {name: leaf for name, leaf in params.items() if name.startswith(("stem", "stage0"))}
    x = np.ones((1, 32, 32, 3), np.float32)
    last, found = network.apply({"params": part}, x, intermediates=("stages/0", "stem"), final=False)
    assert last is None and found["stages/0"].shape == found["stem"].shape == (1, 8, 8, 8)


def test_half_precision_is_close() -> None:
    x = draw_input(0, (1, 16, 12, 3))
    shapes = jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(TINY.init, jax.random.key(0), x)["params"])
    params = unflatten(draw_weights(flatten(shapes)))

    def run(**changes):
        network = TINY.clone(**changes)
        last, found = jax.jit(lambda params, x: network.apply({"params": params}, x, intermediates=("pooled",)))(
            params, x
        )
        assert last.dtype == found["pooled"].dtype == network.dtype
        return np.asarray(last, np.float32)

    expected = run(depthwise="grouped")
    np.testing.assert_allclose(run(depthwise="shifts"), expected, atol=1e-5)
    np.testing.assert_allclose(run(depthwise="grouped", dtype=jnp.bfloat16), expected, atol=0.1)


def test_response_norm_by_hand() -> None:
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype(np.float32)
    scale, bias = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
    y = ResponseNorm().apply({"params": {"scale": scale, "bias": bias}}, x)
    norms = np.sqrt((x[0] ** 2).sum((0, 1)))
    np.testing.assert_allclose(y[0], x[0] * (1 + scale * norms / norms.mean()) + bias, rtol=1e-4, atol=1e-5)


def test_every_parameter_has_axes() -> None:
    for kind in ("v1", "v2"):
        tree = jax.eval_shape(NETWORKS[kind][1].init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
        specs = logical_specs(tree, LOGICAL_AXES, "ConvNeXt")
        assert specs["stage2"]["fc1"]["kernel"] == ("layers", "embed", "mlp")


def test_sharded_over_a_mesh(golden) -> None:
    """Batch and widths split over eight devices: the same numbers."""
    rules, network = NETWORKS["v2"]
    shapes, names = published("v2")
    params = to_tree(draw_weights(names), rules, shapes)
    x = np.repeat(pixels("wide").transpose(0, 2, 3, 1), 2, axis=0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = jax.device_put(params, tree_shardings(params, logical_specs(params, LOGICAL_AXES, "ConvNeXt"), mesh))
    assert not split["stage2"]["fc1"]["kernel"].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        last, _ = jax.jit(lambda params, x: network.apply({"params": params}, x))(split, shard_batch(x, mesh))
    np.testing.assert_allclose(last, np.repeat(golden["v2/wide/stages/-1"], 2, axis=0), atol=1e-5)


def test_refusals() -> None:
    network = NETWORKS["v1"][1]
    x = np.zeros((1, 32, 32, 3), np.float32)
    params = {"params": {}}
    with pytest.raises(InputError, match=r"both at least 32, found \(1, 31, 32, 3\)"):
        network.apply(params, x[:, 1:])
    with pytest.raises(InputError, match="'stages/4': the encoder has 4 stages"):
        network.apply(params, x, intermediates=("stages/4",))
    with pytest.raises(InputError, match="'layers/0': expected stem, stages/<i> or pooled"):
        network.apply(params, x, intermediates=("layers/0",))


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **{name: values for kind in NETWORKS for name, values in reference(kind)[0].items()})
