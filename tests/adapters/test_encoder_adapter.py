from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.adapters.encoder_adapter import LOGICAL_AXES, EncoderAdapter
from tove_jax.errors import InputError
from tove_jax.parallel import flat_paths, logical_specs

SIZES = {
    "sam": ((64, 64, 256), 2_623_040),
    "eva02": ((64, 64, 1024), 3_409_472),
    "pix2struct": ((32, 32, 1536), 2_164_288),
    "convnext": ((32, 32, 3072), 3_737_152),
}


@pytest.mark.parametrize("teacher", SIZES)
def test_sizes_of_the_released_ones(teacher):
    shape, size = SIZES[teacher]
    sample = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    tree = jax.eval_shape(EncoderAdapter(576, 1024).init, jax.random.key(0), sample)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == size
    shapes = {name: leaf.shape for name, leaf in flat_paths(tree).items()}
    tokens = shape[0] * shape[1]
    assert shapes["channel/kernel"] == (shape[2], 1024) and shapes["token/kernel"] == (tokens, 576)
    logical_specs({"method": {teacher: tree}}, LOGICAL_AXES, "axes")


def test_equals_the_formula():
    patches = np.random.default_rng(0).standard_normal((2, 2, 3, 5)).astype(np.float32)
    module = EncoderAdapter(tokens=4, width=7)
    params = module.init(jax.random.key(0), patches)["params"]
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    hidden = patches.reshape(2, 6, 5) @ p["channel"]["kernel"] + p["channel"]["bias"]
    hidden = hidden.swapaxes(1, 2)
    hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    expected = (hidden @ p["token"]["kernel"] + p["token"]["bias"]).swapaxes(1, 2)
    np.testing.assert_allclose(module.apply({"params": params}, patches), expected, atol=1e-5)
    for name, fan_in in (("channel", 5), ("token", 6)):
        assert np.abs(p[name]["kernel"]).max() <= fan_in**-0.5 and np.asarray(p[name]["bias"]).any()


@pytest.mark.parametrize("grid,side", [((8, 8), 3), ((2, 4), 4), ((3, 3), 3)])
def test_interpolation_equals_torch(grid, side):
    torch = pytest.importorskip("torch")
    patches = np.random.default_rng(0).standard_normal((2, *grid, 5)).astype(np.float32)
    module = EncoderAdapter(tokens=side * side, width=5, interpolate=True)
    params = {"channel": {"kernel": np.eye(5, dtype=np.float32), "bias": np.zeros(5, np.float32)}}
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(patches).permute(0, 3, 1, 2), size=(side, side), mode="bilinear", align_corners=False
    )
    expected = resized.permute(0, 2, 3, 1).reshape(2, side * side, 5).numpy()
    np.testing.assert_allclose(module.apply({"params": params}, patches), expected, atol=1e-5)


def test_interpolation_wants_a_square_grid():
    with pytest.raises(InputError, match="square student grid, found 6 tokens"):
        EncoderAdapter(6, 5, interpolate=True).init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))
