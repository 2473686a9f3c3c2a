from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.models.resize import corner_matrix, resize_corners


@pytest.mark.parametrize("shape", [(10, 14), (4, 3), (5, 7), (1, 9), (16, 7)])
def test_equals_torch(shape):
    torch = pytest.importorskip("torch")
    x = np.random.RandomState(0).standard_normal((2, 5, 7, 3)).astype(np.float32)
    channels_first = torch.from_numpy(x).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(channels_first, size=shape, mode="bilinear", align_corners=True)
    np.testing.assert_allclose(resize_corners(jnp.asarray(x), shape), expected.permute(0, 2, 3, 1), atol=1e-5)


def test_known_numbers():
    np.testing.assert_allclose(corner_matrix(2, 5) @ [0.0, 4.0], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(corner_matrix(4, 4), np.eye(4))
    np.testing.assert_array_equal(corner_matrix(1, 3), np.ones((3, 1)))
    assert resize_corners(jnp.ones((1, 2, 2, 1), jnp.bfloat16), (4, 4)).dtype == jnp.bfloat16
