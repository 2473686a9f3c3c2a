from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.models.position import antialiased_bicubic_matrix, bicubic_matrix, resize_map, resize_position

CASES = [(4, 7), (7, 4), (24, 16), (3, (5, 2))]


def embedding(side, width=6):
    return np.random.RandomState(0).standard_normal((1 + side * side, width)).astype(np.float32)


@pytest.mark.parametrize("side,grid", CASES)
def test_equals_torch(side, grid):
    torch = pytest.importorskip("torch")
    table = embedding(side)
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    patches = torch.from_numpy(table[1:]).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(patches, size=(rows, columns), mode="bicubic", align_corners=False)
    resized = resized.permute(0, 2, 3, 1).reshape(rows * columns, -1).numpy()
    result = resize_position(table, grid)
    np.testing.assert_array_equal(result[0], table[0])
    np.testing.assert_allclose(result[1:], resized, atol=1e-5)


def test_equals_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=8
    )
    model = transformers.CLIPVisionModel(config)
    inner = getattr(model, "vision_model", model).embeddings
    table = embedding(4)
    inner.position_embedding.weight.data = torch.from_numpy(table)
    larger = torch.zeros(1, 1 + 36, 6)
    expected = inner.interpolate_pos_encoding(larger, 48, 48)[0].detach().numpy()
    np.testing.assert_allclose(resize_position(table, 6), expected, atol=1e-5)


def test_known_numbers():
    """A ramp shrunk to half: inside, the filter with a = -0.75 keeps it a ramp of twice the slope."""
    matrix = bicubic_matrix(8, 4)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
    np.testing.assert_allclose(matrix[1], [0, -0.09375, 0.59375, 0.59375, -0.09375, 0, 0, 0])
    np.testing.assert_allclose((matrix @ np.arange(8))[1:3], [2.5, 4.5])
    # The border repeats its edge: the weight of sample -1 falls on sample 0.
    np.testing.assert_allclose(matrix[0], [0.5, 0.59375, -0.09375, 0, 0, 0, 0, 0])


def test_same_grid_is_untouched_and_wrong_rows_are_refused():
    table = embedding(4)
    assert resize_position(table, 4) is table
    half = table.astype(np.float16)
    assert resize_position(half, 6).dtype == np.float16
    with pytest.raises(InputError, match=r"expected 1 \+ n \* n rows, found 12"):
        resize_position(table[:12], 4)


@pytest.mark.parametrize("grid", [(7, 3), (4, 4)])
def test_a_map_inside_a_traced_function(grid):
    table = embedding(4)
    found = jax.jit(lambda t: resize_map(t, grid))(jnp.asarray(table[1:].reshape(4, 4, -1)))
    np.testing.assert_allclose(found.reshape(-1, 6), resize_position(table, grid)[1:], atol=1e-6)
    assert resize_map(jnp.zeros((4, 4, 2), jnp.bfloat16), grid).dtype == jnp.bfloat16


@pytest.mark.parametrize("grid", [(7, 3), (2, 9), (16, 16)])
def test_antialiased_equals_torch(grid):
    torch = pytest.importorskip("torch")
    table = embedding(5)[1:].reshape(5, 5, -1)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(table).permute(2, 0, 1)[None], size=grid, mode="bicubic", antialias=True
    )[0].permute(1, 2, 0).numpy()  # fmt: skip
    np.testing.assert_allclose(resize_map(jnp.asarray(table), grid, antialias=True), expected, atol=1e-5)


def test_antialiased_known_numbers():
    """Shrunk to half, the kernel spans eight samples; enlarged, Keys' cubic with a = -0.5 at -0.25 and 0.75."""
    matrix = antialiased_bicubic_matrix(16, 8)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
    assert (matrix[3] != 0).sum() == 8 and matrix[3, 6] == matrix[3, 7] > matrix[3, 5] > 0 > matrix[3, 4]
    np.testing.assert_allclose(
        antialiased_bicubic_matrix(8, 16)[7, 2:6], [-0.0703125, 0.8671875, 0.2265625, -0.0234375]
    )
