"""DexiNed at its published size, against the released PyTorch network.

The golden holds its maps, thinned by `thin`, for weights and inputs drawn by the rule of `tests.encoder_rules`
(inputs of seed 200, scaled by 50). ``python -m tests.models.test_dexined`` makes it with torch, from `reference`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.encoder_rules import ENCODERS, draw_input, draw_weights, read_names
from tove_jax.errors import InputError
from tove_jax.experts import edges
from tove_jax.hf.rules import flatten, to_tree
from tove_jax.models.dexined import LOGICAL_AXES, DexiNed, Doubling
from tove_jax.parallel import logical_specs

GOLDEN = ENCODERS / "dexined.npz"
NAMES = read_names("dexined_names.json")["dexined"]
SHAPES = {"wide": (2, 3, 96, 128), "tall": (1, 3, 64, 32)}


def thin(maps):
    """Keeps every third row and column, which holds both parities of either."""
    return maps[:, ::3, ::3]


def picture(shape) -> np.ndarray:
    return draw_input(200, shape, 50)


def reference(shape) -> np.ndarray:
    """Returns the six side maps and the fused one in torch, float32 (B, H, W, 7) of logits."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    weights = {name: torch.tensor(array) for name, array in draw_weights(NAMES).items()}

    def conv(x, name, norm=None, stride=1, padding=0):
        x = functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding)
        if norm is None:
            return x
        parts = (weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *parts, eps=1e-5)

    def single(x, name, stride=1):
        return conv(x, f"{name}.conv", f"{name}.bn", stride)

    def double(x, name, stride=1):
        x = functional.relu(conv(x, f"{name}.conv1", f"{name}.bn1", stride, 1))
        return conv(x, f"{name}.conv2", f"{name}.bn2", 1, 1)

    def dense(x, beside, name, layers):
        for layer in range(1, layers + 1):
            prefix = f"{name}.denselayer{layer}"
            y = functional.relu(conv(functional.relu(x), f"{prefix}.conv1", f"{prefix}.norm1", 1, 2))
            x = 0.5 * (conv(y, f"{prefix}.conv2", f"{prefix}.norm2") + beside)
        return x

    def pool(x):
        return functional.max_pool2d(x, 3, 2, 1)

    def side(x, number, doublings):
        prefix, padding = f"up_block_{number}.features", 2 ** (doublings - 1) - 1
        for step in range(doublings):
            x = functional.relu(conv(x, f"{prefix}.{3 * step}"))
            name = f"{prefix}.{3 * step + 2}"
            x = functional.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 2, padding)
        return x

    with torch.no_grad():
        b1 = functional.relu(double(torch.tensor(picture(shape)), "block_1", 2))
        b2 = double(b1, "block_2")
        down2 = pool(b2)
        add2 = down2 + single(b1, "side_1", 2)
        b3 = dense(add2, single(down2, "pre_dense_3"), "dblock_3", 2)
        down3 = pool(b3)
        add3 = down3 + single(add2, "side_2", 2)
        b4 = dense(add3, single(down3 + single(down2, "pre_dense_2", 2), "pre_dense_4"), "dblock_4", 3)
        down4 = pool(b4)
        add4 = down4 + single(add3, "side_3", 2)
        b5 = dense(add4, single(down4, "pre_dense_5"), "dblock_5", 3)
        b6 = dense(b5 + single(add4, "side_4"), single(b5, "pre_dense_6"), "dblock_6", 3)
        maps = [
            side(x, n, u)
            for n, (x, u) in enumerate(zip((b1, b2, b3, b4, b5, b6), (1, 1, 2, 3, 4, 4), strict=True), start=1)
        ]
        fused = conv(torch.cat(maps, 1), "block_cat.conv")
        return torch.cat([*maps, fused], 1).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def params():
    row = edges.ROWS[0]
    tree = to_tree(row.canonical(draw_weights(NAMES)), row.rules, row.shapes(), ignore=row.ignore)
    return jax.tree.map(jnp.asarray, tree)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.goldens
def test_golden_is_the_reference(golden):
    for name, shape in SHAPES.items():
        np.testing.assert_allclose(golden[name], thin(reference(shape)), atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_golden(name, params, golden):
    def run(params, pixels):
        fused, found = DexiNed().apply({"params": params}, pixels, intermediates=edges.SIDES)
        return jnp.concatenate([*(found[side] for side in edges.SIDES), fused], axis=-1)

    found = jax.jit(run)(params, picture(SHAPES[name]).transpose(0, 2, 3, 1))
    batch, _, high, wide = SHAPES[name]
    assert found.shape == (batch, high, wide, 7)
    for index in range(7):  # the maps' sizes differ a hundredfold
        wanted = golden[name][..., index]
        np.testing.assert_allclose(thin(found)[..., index], wanted, atol=1e-5 * np.abs(wanted).max(), rtol=1e-5)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_doubling_is_a_transposed_convolution(size):
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    module = Doubling(6, size)
    params = module.init(jax.random.key(1), x)["params"]
    params["bias"] = jax.random.normal(jax.random.key(2), (6,))
    pad = size - 1 - (size // 2 - 1)  # of the zero-filled picture: kernel - 1 - torch's padding
    kernel = params["kernel"][::-1, ::-1].swapaxes(2, 3)
    expected = params["bias"] + jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((pad, pad), (pad, pad)), lhs_dilation=(2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)


def test_every_parameter_has_axes():
    specs = logical_specs({path: np.empty(shape) for path, shape in edges.ROWS[0].shapes().items()}, LOGICAL_AXES, "t")
    assert specs["block4_layer2_conv1/kernel"] == (None, None, None, "embed")
    assert specs["side3_up0/kernel"] == (None, None, None, None) and len(specs) == len(flatten(specs))


def test_wrong_requests_are_refused():
    for shape, names, message in (
        ((1, 40, 48, 3), (), r"pixels: expected .* multiples of 16, found \(1, 40, 48, 3\)"),
        ((1, 32, 32, 1), (), "pixels: expected"),
        ((1, 32, 32, 3), ("side7",), r"intermediates: expected names among side1.*found \['side7'\]"),
    ):
        with pytest.raises(InputError, match=message):
            jax.eval_shape(
                lambda x, names=names: DexiNed().init(jax.random.key(0), x, intermediates=names),
                jax.ShapeDtypeStruct(shape, jnp.float32),
            )


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **{name: thin(reference(shape)) for name, shape in SHAPES.items()})
