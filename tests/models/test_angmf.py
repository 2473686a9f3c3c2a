"""NLL-AngMF's network at its published size, against the released PyTorch network.

The golden holds its four estimates, the finer ones thinned by `THIN`, for weights and inputs drawn by the rule of
`tests.encoder_rules` (inputs of seed 300). ``python -m tests.models.test_angmf`` makes it with torch, from `reference`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.encoder_rules import ENCODERS, draw_input, draw_weights, read_names
from tove_jax.errors import InputError
from tove_jax.experts import normals
from tove_jax.hf.rules import to_tree
from tove_jax.models.angmf import LOGICAL_AXES, MIN_KAPPA, SCALES, AngMF
from tove_jax.parallel import logical_specs

GOLDEN = ENCODERS / "nll_angmf.npz"
NAMES = read_names("nll_angmf_names.json")["nll_angmf"]
SHAPES = {"wide": (2, 3, 96, 128), "tall": (1, 3, 64, 32)}
THIN = {"scale8": 1, "scale4": 1, "scale2": 3, "scale1": 5}


def thin(maps):
    """Thins each estimate (B, H, W, 4) by its factor."""
    return {scale: maps[scale][:, ::step, ::step] for scale, step in THIN.items()}


def reference(shape) -> dict[str, np.ndarray]:
    """Returns the four estimates in torch, float32 (B, h, w, 4)."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    weights = {name: torch.tensor(array) for name, array in draw_weights(NAMES).items()}

    def norm(x, name, epsilon):
        parts = (weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *parts, eps=epsilon)

    def same(x, name, stride=1, groups=1):
        kernel = weights[f"{name}.weight"]
        pads = []
        for side in x.shape[:1:-1]:  # the last axis first, as torch's pad wants them
            total = max((-(-side // stride) - 1) * stride + kernel.shape[-1] - side, 0)
            pads += [total // 2, total - total // 2]
        bias = weights.get(f"{name}.bias")
        return functional.conv2d(functional.pad(x, pads), kernel, bias, stride, groups=groups)

    def block(x, prefix, stride):
        first, shortcut = 1, x
        if f"{prefix}.conv_pwl.weight" in weights:
            x = functional.silu(norm(same(x, f"{prefix}.conv_pw"), f"{prefix}.bn1", 1e-3))
            first = 2
        x = same(x, f"{prefix}.conv_dw", stride, x.shape[1])
        x = functional.silu(norm(x, f"{prefix}.bn{first}", 1e-3))
        gate = functional.silu(same(x.mean((2, 3), keepdim=True), f"{prefix}.se.conv_reduce"))
        x = x * torch.sigmoid(same(gate, f"{prefix}.se.conv_expand"))
        x = same(x, f"{prefix}.conv_pwl" if first == 2 else f"{prefix}.conv_pw")
        x = norm(x, f"{prefix}.bn{first + 1}", 1e-3)
        return x + shortcut if x.shape == shortcut.shape else x

    def grow(x, size):
        return functional.interpolate(x, size=size, mode="bilinear", align_corners=True)

    def up(x, skip, name):
        x = torch.cat([grow(x, skip.shape[2:]), skip], 1)
        for index in (0, 3):
            x = functional.leaky_relu(norm(same(x, f"{name}._net.{index}"), f"{name}._net.{index + 1}", 1e-5))
        return x

    def directions(x):
        length = (x[:, :1] ** 2 + x[:, 1:2] ** 2 + x[:, 2:3] ** 2).sqrt() + 1e-10
        return torch.cat([x[:, :3] / length, functional.elu(x[:, 3:]) + 1.01], 1)

    def refine(x, estimate, name):
        size = [2 * side for side in x.shape[2:]]
        x = torch.cat([grow(x, size), grow(estimate, size)], 1).flatten(2)
        for index in (0, 2, 4, 6):
            x = functional.conv1d(x, weights[f"{name}.{index}.weight"], weights[f"{name}.{index}.bias"])
            x = functional.relu(x) if index < 6 else x
        return directions(x.unflatten(2, size))

    with torch.no_grad():
        prefix, maps = "encoder.original_model", []
        x = functional.silu(
            norm(same(torch.tensor(draw_input(300, shape)), f"{prefix}.conv_stem", 2), f"{prefix}.bn1", 1e-3)
        )
        for index, (blocks, stride) in enumerate(zip((3, 5, 5, 7, 7, 9, 3), (1, 2, 2, 2, 1, 2, 1), strict=True)):
            for number in range(blocks):
                x = block(x, f"{prefix}.blocks.{index}.{number}", stride if number == 0 else 1)
            maps.append(x)
        x = same(same(x, f"{prefix}.conv_head"), "decoder.conv2")
        decoded = []
        for step, skip in enumerate((4, 2, 1, 0), start=1):
            x = up(x, maps[skip], f"decoder.up{step}")
            decoded.append(x)
        found = [directions(same(decoded[1], "decoder.out_conv_res8"))]
        for scale, x in zip((4, 2, 1), decoded[1:], strict=True):
            found.append(refine(x, found[-1], f"decoder.out_conv_res{scale}"))
    return {scale: x.permute(0, 2, 3, 1).numpy() for scale, x in zip(THIN, found, strict=True)}


@pytest.fixture(scope="module")
def params():
    row = normals.ROWS[0]
    tree = to_tree(row.canonical(draw_weights(NAMES)), row.rules, row.shapes(), ignore=row.ignore)
    return jax.tree.map(jnp.asarray, tree)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.goldens
def test_golden_is_the_reference(golden):
    for name, shape in SHAPES.items():
        for scale, maps in thin(reference(shape)).items():
            np.testing.assert_allclose(golden[f"{name}/{scale}"], maps, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_golden(name, params, golden):
    def run(params, pixels):
        finest, found = AngMF().apply({"params": params}, pixels, intermediates=SCALES)
        return {**found, "scale1": finest}

    found = jax.jit(run)(params, draw_input(300, SHAPES[name]).transpose(0, 2, 3, 1))
    batch, _, high, wide = SHAPES[name]
    assert found["scale1"].shape == (batch, high, wide, 4) and found["scale8"].shape == (batch, high // 8, wide // 8, 4)
    for scale, maps in thin(found).items():
        np.testing.assert_allclose(maps, golden[f"{name}/{scale}"], atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(found["scale1"][..., :3], axis=-1), 1, atol=1e-5)
    assert float(found["scale1"][..., 3].min()) >= MIN_KAPPA


def test_every_parameter_has_axes():
    shapes = normals.ROWS[0].shapes()
    specs = logical_specs({path: np.empty(shape) for path, shape in shapes.items()}, LOGICAL_AXES, "t")
    assert specs["encoder/stage3_rest/expand/kernel"] == ("layers", None, None, None, "embed")
    assert specs["refine1_3/kernel"] == (None, "embed", None)


def test_half_precision_gives_single_precision_normals():
    net, pixels = AngMF(dtype=jnp.bfloat16), jax.ShapeDtypeStruct((1, 64, 32, 3), jnp.float32)
    found = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x, intermediates=SCALES), pixels)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_wrong_requests_are_refused():
    for shape, names, message in (
        ((1, 40, 64, 3), (), r"pixels: expected .* multiples of 32, found \(1, 40, 64, 3\)"),
        ((1, 32, 32, 3), ("scale1",), r"intermediates: expected names among scale8.*found \['scale1'\]"),
    ):
        with pytest.raises(InputError, match=message):
            jax.eval_shape(
                lambda x, names=names: AngMF().init(jax.random.key(0), x, intermediates=names),
                jax.ShapeDtypeStruct(shape, jnp.float32),
            )


if __name__ == "__main__":
    arrays = {name: thin(reference(shape)) for name, shape in SHAPES.items()}
    np.savez_compressed(GOLDEN, **{f"{name}/{scale}": x for name, maps in arrays.items() for scale, x in maps.items()})
