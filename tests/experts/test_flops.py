"""Operations of the experts: counted as the compiler counts, loops in full, and the written table is current."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.experts import flops, registry
from tove_jax.experts.gflops import GFLOPS
from tove_jax.experts.published import Published
from tove_jax.parallel import logical_specs

# One cheap row of each family.
FAMILIES = ("clip_b_32", "convnext_t", "pix2struct_b", "eva02_l", "sam_b", "depth_anything_s", "edges", "normals")


def compilers(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def test_products_and_convolutions_are_the_compilers():
    left, right = jax.ShapeDtypeStruct((4, 6, 10), jnp.float32), jax.ShapeDtypeStruct((4, 10, 7), jnp.float32)
    assert flops.flops(jnp.matmul, left, right) == compilers(jnp.matmul, left, right) == 2 * 4 * 6 * 10 * 7

    def convolve(pixels, kernel, groups=1, stride=2):
        return jax.lax.conv_general_dilated(
            pixels,
            kernel,
            (stride, stride),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    pixels, kernel = jax.ShapeDtypeStruct((2, 9, 9, 8), jnp.float32), jax.ShapeDtypeStruct((3, 3, 8, 6), jnp.float32)
    assert flops.flops(convolve, pixels, kernel) == compilers(convolve, pixels, kernel) == 2 * (2 * 4 * 4 * 6) * 9 * 8
    deep = jax.ShapeDtypeStruct((3, 3, 1, 8), jnp.float32)
    assert flops.flops(lambda x, k: convolve(x, k, 8, 1), pixels, deep) == 2 * (2 * 7 * 7 * 8) * 9


def test_loops_count_in_full():
    matrix, stack = jnp.ones((8, 8)), jnp.ones((5, 8, 8))

    def scanned(matrix, stack):
        return jax.lax.scan(lambda carry, kernel: (jax.checkpoint(jnp.matmul)(carry, kernel), None), matrix, stack)[0]

    assert flops.flops(jax.jit(scanned), matrix, stack) == 5 * 2 * 8**3
    assert compilers(scanned, matrix, stack) < 2 * 2 * 8**3
    chosen = lambda go: jax.lax.cond(go, lambda: matrix @ matrix @ matrix, lambda: matrix)  # noqa: E731
    assert flops.flops(chosen, True) == 2 * 2 * 8**3
    with pytest.raises(ValueError, match="a loop of unknown length"):
        flops.flops(lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ y, x), matrix)


def test_every_expert_has_its_number():
    known = {name for name, card in registry.cards().items() if card.backend == "jax" and name != "clip"}
    assert set(GFLOPS) == known, "run `python -m tove_jax.experts.flops`"
    # Published by their papers, multiplications counted once: ConvNeXt-T 4.5, EfficientNet-Lite0 0.407.
    assert GFLOPS["convnext_t"] / 2 == pytest.approx(4.5, rel=0.02)
    assert GFLOPS["efficientnet_lite0"] / 2 == pytest.approx(0.4, rel=0.05)
    # A scanned tower: about two operations a weight and token, and attention.
    tokens, weights = 1 + 24**2, 24 * 12 * 1024**2
    assert GFLOPS["clip_l_14_336"] * 1e9 == pytest.approx(2 * tokens * (weights + 24 * 2 * tokens * 1024), rel=0.06)


def test_the_table_is_current():
    cheap = ("clip_b_32", "convnext_t", "efficientnet_lite0")
    assert flops.expert_gflops(cheap) == {name: GFLOPS[name] for name in ("efficientnet_lite0", *cheap[:2])}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_have_logical_axes_for_every_parameter(name):
    import sys

    row = next(row for family in registry.FAMILIES for row in family.ROWS if row.card.name == name)
    assert isinstance(row, Published)
    axes = sys.modules[type(row.build(row.card.view.size)).__module__].LOGICAL_AXES
    specs = logical_specs(row.abstract(), axes, name)
    assert any(np.size(spec) and any(spec) for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, tuple)))
