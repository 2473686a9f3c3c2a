from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.models.relative_position import decomposed_bias, linear_matrix, relative_rows


def draw(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("source,target", [(7, 13), (13, 7), (5, 5)])
def test_linear_interpolation_equals_torch(source, target):
    torch = pytest.importorskip("torch")
    table = draw(source, 3)
    expected = torch.nn.functional.interpolate(torch.from_numpy(table.T[None]), size=target, mode="linear")[0].T
    np.testing.assert_allclose(linear_matrix(source, target) @ table, expected.numpy(), atol=1e-6)


def test_linear_interpolation_of_known_numbers():
    np.testing.assert_allclose(linear_matrix(3, 6)[:3], [[1, 0, 0], [0.75, 0.25, 0], [0.25, 0.75, 0]])
    np.testing.assert_array_equal(linear_matrix(4, 4), np.eye(4))


def test_distances_are_query_minus_key():
    table = jnp.arange(7.0)[:, None]  # row i stands for the distance i - 3
    found = np.asarray(relative_rows(table, 4))[..., 0] - 3
    np.testing.assert_array_equal(found, np.arange(4)[:, None] - np.arange(4)[None])
    with pytest.raises(InputError, match=r"expected \(2 s - 1, d\), found \(6, 1\)"):
        relative_rows(table[1:], 4)


def test_bias_is_the_query_times_both_embeddings():
    high, wide, width = 2, 3, 4
    query, rows, columns = draw(1, high * wide, 2, width), draw(3, width, seed=1), draw(5, width, seed=2)
    found = np.asarray(decomposed_bias(*map(jnp.asarray, (query, rows, columns)), (high, wide)))
    assert found.shape == (1, 2, 6, 6)
    for head in range(2):
        for q in range(6):
            for k in range(6):
                down, across = q // wide - k // wide, q % wide - k % wide
                expected = query[0, q, head] @ (rows[down + 1] + columns[across + 2])
                np.testing.assert_allclose(found[0, head, q, k], expected, atol=1e-5)


@pytest.mark.parametrize("grid,tables", [((4, 4), 7), ((5, 3), 7)])
def test_bias_equals_transformers(grid, tables):
    """The second case interpolates tables made for another grid."""
    torch = pytest.importorskip("torch")
    sam = pytest.importorskip("transformers.models.sam.modeling_sam")
    high, wide = grid
    query, rows, columns = draw(2, high * wide, 3, 6), draw(tables, 6, seed=1), draw(tables, 6, seed=2)
    by_head = torch.from_numpy(query).transpose(1, 2).reshape(6, high * wide, 6)
    attention = sam.SamVisionAttention.__new__(sam.SamVisionAttention)
    expected = sam.SamVisionAttention.get_decomposed_rel_pos(
        attention, by_head, torch.from_numpy(rows), torch.from_numpy(columns), grid, grid
    )
    found = decomposed_bias(*map(jnp.asarray, (query, rows, columns)), grid)
    np.testing.assert_allclose(found, expected.reshape(found.shape).numpy(), atol=1e-5)


def test_half_precision_keeps_single_precision_scores():
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in (draw(1, 4, 1, 4), draw(3, 4, seed=1), draw(3, 4, seed=2))]
    assert decomposed_bias(*arrays, (2, 2)).dtype == jnp.float32
