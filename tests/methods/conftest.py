"""What the tests of the methods share."""

import jax
import pytest

from tests.methods.hawaii_cases import draw, make_config
from tove_jax.methods import hawaii


@pytest.fixture(scope="package")
def whole():
    """HAWAII's student away from its start, and its jitted passes."""
    config = make_config()
    student, params, pixels, *_ = draw(config)
    return config, student, params, pixels, jax.jit(lambda p, x: hawaii.forward(student, p, x, {}, config, None))
