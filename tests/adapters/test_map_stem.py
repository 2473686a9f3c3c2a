"""Map stems and the bilinear resize, against torch, and by their shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.adapters.map_stem import MapStem, resize_grid, unit_range
from tove_jax.errors import InputError

SHAPES = [((5, 7), (4, 4)), ((3, 3), (8, 6)), ((7, 7), (14, 14)), ((14, 14), (6, 6))]


@pytest.mark.parametrize(("source", "target"), SHAPES)
def test_resize_equals_torch(source, target):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, *source, 3))
    wanted = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), size=target, mode="bilinear", align_corners=False
    )
    with jax.enable_x64(True):
        found = resize_grid(jnp.asarray(x), target)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1).numpy(), atol=1e-9)


def test_resize_keeps_a_plane_and_the_same_grid():
    """Half-pixel centres: a plane that rises by one a pixel is sampled at (i + 0.5) * ratio - 0.5."""
    plane = jnp.broadcast_to(jnp.arange(8.0)[None, :, None, None], (1, 8, 8, 1))
    np.testing.assert_allclose(resize_grid(plane, (4, 8))[0, :, 0, 0], [0.5, 2.5, 4.5, 6.5], atol=1e-6)
    assert resize_grid(plane, (8, 8)) is plane


def test_maps_span_minus_one_to_one_by_picture():
    x = np.random.default_rng(0).standard_normal((3, 4, 5, 3)).astype(np.float32)
    x[1] *= 100
    x[2] = 7
    scaled = np.asarray(unit_range(jnp.asarray(x)))
    np.testing.assert_allclose(scaled[:2].min((1, 2, 3)), -1, atol=1e-6)
    np.testing.assert_allclose(scaled[:2].max((1, 2, 3)), 1, atol=1e-6)
    np.testing.assert_array_equal(scaled[2], 0)
    # One range for the channels together, so their differences keep their ratios.
    a, b = (x[0, 0, 0, 0] - x[0, 0, 0, 1]), (x[0, 0, 0, 1] - x[0, 0, 0, 2])
    c, d = (scaled[0, 0, 0, 0] - scaled[0, 0, 0, 1]), (scaled[0, 0, 0, 1] - scaled[0, 0, 0, 2])
    np.testing.assert_allclose(a / b, c / d, rtol=1e-4)
    assert np.isfinite(jax.grad(lambda m: unit_range(m).sum())(jnp.asarray(x))).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_stem_has_the_written_parameters_and_equals_torch(channels):
    stem = MapStem((2, 3), 16, groups=2)
    maps = np.random.default_rng(1).standard_normal((2, 20, 40, channels)).astype(np.float32)
    params = jax.jit(stem.init)(jax.random.key(0), maps)["params"]
    widths = [channels, 2, 4, 8, 16]
    expected = {f"conv{i}": {"kernel": (3, 3, widths[i], widths[i + 1])} for i in range(4)}
    expected |= {f"norm{i}": {"scale": (widths[i + 1],), "bias": (widths[i + 1],)} for i in range(4)}
    expected["out"] = {"kernel": (1, 1, 16, 16), "bias": (16,)}
    assert jax.tree.map(jnp.shape, params) == expected
    generator = np.random.default_rng(2)
    params = jax.tree.map(lambda p: np.asarray(p) + 0.1 * generator.standard_normal(p.shape).astype(np.float32), params)
    found = jax.jit(stem.apply)({"params": params}, maps)
    assert found.shape == (2, 2, 3, 16)

    torch = pytest.importorskip("torch")
    functional, place = torch.nn.functional, lambda p, *axes: torch.tensor(np.asarray(p)).permute(*axes)
    x = place(resize_grid(unit_range(jnp.asarray(maps)), (32, 48)), 0, 3, 1, 2)
    for i in range(4):
        x = functional.conv2d(x, place(params[f"conv{i}"]["kernel"], 3, 2, 0, 1), stride=2, padding=1)
        scale, bias = (place(params[f"norm{i}"][name], 0) for name in ("scale", "bias"))
        x = functional.relu(functional.group_norm(x, 2, scale, bias, 1e-5))
    x = functional.conv2d(x, place(params["out"]["kernel"], 3, 2, 0, 1), place(params["out"]["bias"], 0))
    np.testing.assert_allclose(found, x.permute(0, 2, 3, 1).numpy(), atol=2e-5)


def test_what_is_no_map_is_refused():
    with pytest.raises(InputError, match="1 to 3 channels, found 4"):
        jax.eval_shape(MapStem((2, 2), 16, 2).init, jax.random.key(0), jnp.zeros((1, 8, 8, 4)))
    with pytest.raises(InputError, match="stem_width: expected a multiple of 8 x 3, found 16"):
        jax.eval_shape(MapStem((2, 2), 16, 3).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
