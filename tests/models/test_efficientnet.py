"""EfficientNet's trunk; B5 is tested through NLL-AngMF, Lite0 through its expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.models.efficientnet import (
    LOGICAL_AXES,
    DepthwiseConvolution,
    EfficientNet,
    Stage,
    scaled_stages,
    scaled_width,
)
from tove_jax.parallel import logical_specs


def test_published_sizes():
    """B0 to B7: width, depth, stem, last stage, head, and blocks, as the paper's models are built."""
    for width, depth, stem, last, head, blocks in (
        (1.0, 1.0, 32, 320, 1280, 16),
        (1.0, 1.1, 32, 320, 1280, 23),
        (1.1, 1.2, 32, 352, 1408, 23),
        (1.2, 1.4, 40, 384, 1536, 26),
        (1.4, 1.8, 48, 448, 1792, 32),
        (1.6, 2.2, 48, 512, 2048, 39),
        (1.8, 2.6, 56, 576, 2304, 45),
        (2.0, 3.1, 64, 640, 2560, 55),
    ):
        stages = scaled_stages(width, depth)
        assert (scaled_width(32, width), stages[-1].width, scaled_width(1280, width)) == (stem, last, head)
        assert sum(stage.repeats for stage in stages) == blocks


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 8), (3, 2, 8), (5, 2, 9), (5, 1, 3)])
def test_depthwise_methods_agree(kernel: int, stride: int, size: int) -> None:
    x = jax.random.normal(jax.random.key(0), (2, size, size, 6))
    shifts = DepthwiseConvolution(kernel, stride, "shifts")
    params = shifts.init(jax.random.key(1), x)
    params["params"]["bias"] = jax.random.normal(jax.random.key(2), (6,))
    expected = DepthwiseConvolution(kernel, stride, "grouped").apply(params, x)
    np.testing.assert_allclose(shifts.apply(params, x), expected, atol=1e-5)


def test_stages_asked_for():
    stages = (Stage(1, 3, 1, 1, 8), Stage(3, 3, 2, 6, 16))
    net = EfficientNet(stages=stages, stem_width=8, head_width=24, head_bias=False)
    asked = ("stages/1", "stages/0")
    shape = jax.ShapeDtypeStruct((1, 30, 16, 3), jnp.float32)
    (head, found), variables = jax.eval_shape(
        lambda x: net.init_with_output(jax.random.key(0), x, intermediates=asked), shape
    )
    assert sorted(found) == sorted(asked)
    assert head.shape == (1, 8, 4, 24) and found["stages/0"].shape == (1, 15, 8, 8)
    specs = logical_specs(variables["params"], LOGICAL_AXES, "t")
    assert variables["params"]["stage1_rest"]["squeeze"]["kernel"].shape == (2, 1, 1, 96, 4)
    assert specs["stage1_rest"]["squeeze"]["kernel"] == ("layers", None, None, None, "embed")
    with pytest.raises(InputError, match=r"expected names among stages/0, stages/1, found \['stages/2'\]"):
        jax.eval_shape(lambda x: net.init(jax.random.key(0), x, intermediates=("stages/2",)), shape)
    with pytest.raises(InputError, match=r"pixels: expected \(batch, height, width, 3\)"):
        jax.eval_shape(lambda x: net.init(jax.random.key(0), x), jax.ShapeDtypeStruct((30, 16, 3), jnp.float32))
