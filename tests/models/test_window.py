from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.models.window import partition, unpartition
from tove_jax.models.windowed import indices, layer_kinds, run_layers


@pytest.mark.parametrize("grid,window", [((8, 8), 4), ((5, 7), 3), ((2, 3), 4)])
def test_windows_hold_their_squares_and_come_back(grid, window):
    high, wide = grid
    x = np.random.RandomState(0).standard_normal((2, high, wide, 3)).astype(np.float32)
    windows = np.asarray(partition(jnp.asarray(x), window))
    down, across = -(-high // window), -(-wide // window)
    assert windows.shape == (2 * down * across, window, window, 3)
    for picture in range(2):
        for row in range(down):
            for column in range(across):
                square = x[picture, row * window :, column * window :][:window, :window]
                found = windows[(picture * down + row) * across + column]
                np.testing.assert_array_equal(found[: square.shape[0], : square.shape[1]], square)
                assert not found[square.shape[0] :].any() and not found[:, square.shape[1] :].any()
    np.testing.assert_array_equal(unpartition(jnp.asarray(windows), grid), x)


BODIES = {"windowed": lambda p, x: jnp.sin(x * p["a"]), "global": lambda p, x: jnp.cos(x + p["b"])}


@pytest.mark.parametrize("depth,everywhere", [(12, (2, 5, 8, 11)), (7, (3,)), (5, (0, 1)), (6, (0, 2, 4)), (4, ())])
@pytest.mark.parametrize("wanted", [(), (1,), (3, 2)])
def test_layers_run_in_their_order(depth, everywhere, wanted):
    kinds = layer_kinds(depth, everywhere)
    values = np.random.RandomState(1).standard_normal(depth).astype(np.float32)
    stacks = {
        "windowed": {"a": jnp.asarray(values[list(indices(kinds, "windowed"))])},
        "global": {"b": jnp.asarray(values[list(indices(kinds, "global"))])},
    }
    x = expected = np.linspace(-1, 1, 5, dtype=np.float32)
    outputs = {}
    for index, kind in enumerate(kinds):
        expected = np.sin(expected * values[index]) if kind == "windowed" else np.cos(expected + values[index])
        outputs[index] = expected
    result, found = run_layers(kinds, stacks, BODIES, jnp.asarray(x), wanted)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert sorted(found) == sorted(wanted)
    for index in wanted:
        np.testing.assert_allclose(found[index], outputs[index], atol=1e-6)


def test_equal_groups_are_compiled_once():
    """SAM-L's order: one loop over the groups, in it one over the windowed layers and one global layer."""
    kinds = layer_kinds(24, (5, 11, 17, 23))
    stacks = {"windowed": {"a": jnp.ones(20)}, "global": {"b": jnp.ones(4)}}
    jaxpr = str(jax.make_jaxpr(lambda x: run_layers(kinds, stacks, BODIES, x)[0])(jnp.ones(3)))
    assert jaxpr.count(" sin ") == 1 and jaxpr.count(" cos ") == 1


def test_a_global_layer_out_of_range_is_refused():
    with pytest.raises(InputError, match=r"indices below 4, found \[2, 4\]"):
        layer_kinds(4, (2, 4))
