"""The rule engine: exact both ways, strict both ways."""

from __future__ import annotations

import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.hf.rules import Rule, flatten, to_arrays, to_tree, unflatten

TABLE = (
    Rule("stem.weight", "stem/kernel", (2, 3, 1, 0)),
    Rule("blocks.{layer}.fc.weight", "layers/fc/kernel", (0, 2, 1)),
    Rule("blocks.{layer}.moe.{expert}.A", "layers/moe/a", (0, 3, 1, 2)),
    Rule("bias", "bias"),
)
SHAPES = {"stem/kernel": (2, 3, 4, 5), "layers/fc/kernel": (12, 2, 3), "layers/moe/a": (12, 5, 2, 4), "bias": ()}


def published() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {"stem.weight": rng.normal(size=(5, 4, 2, 3)), "bias": rng.normal(size=())}
    for layer in range(12):
        arrays[f"blocks.{layer}.fc.weight"] = rng.normal(size=(3, 2))
        for expert in range(2):
            arrays[f"blocks.{layer}.moe.{expert}.A"] = rng.normal(size=(4, 5))
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def test_layout():
    arrays = published()
    tree = to_tree(arrays, TABLE, SHAPES)
    assert {path: leaf.shape for path, leaf in flatten(tree).items()} == SHAPES
    np.testing.assert_array_equal(tree["stem"]["kernel"][1, 2, 3], arrays["stem.weight"][:, 3, 1, 2])
    # Numbers, not text, order the layers: 10 comes after 9.
    np.testing.assert_array_equal(tree["layers"]["fc"]["kernel"][10], arrays["blocks.10.fc.weight"].T)
    np.testing.assert_array_equal(tree["layers"]["moe"]["a"][11, :, 1], arrays["blocks.11.moe.1.A"].T)


def test_round_trip_to_the_bit(assert_same):
    arrays = published()
    arrays["stem.weight"][0, 0] = np.nan
    arrays["bias"] = np.float32(-0.0).reshape(())
    tree = to_tree(arrays, TABLE, SHAPES)
    assert_same(to_arrays(tree, TABLE), arrays)
    assert_same(to_tree(to_arrays(tree, TABLE), TABLE, SHAPES), tree)
    assert all(leaf.flags.c_contiguous for leaf in [*flatten(tree).values(), *to_arrays(tree, TABLE).values()])


def test_every_fault_is_listed():
    arrays = published()
    arrays["blocks.3.fc.wieght"] = arrays.pop("blocks.3.fc.weight")
    arrays["blocks.12.fc.weight"] = np.zeros((3, 2), np.float32)
    arrays["bias"] = np.zeros(7, np.float32)
    with pytest.raises(InputError) as caught:
        to_tree(arrays, TABLE, SHAPES, source="some/file")
    message = str(caught.value)
    assert message.startswith("some/file: ")
    assert "1 missing: blocks.3.fc.weight (3, 2) (did you mean 'blocks.3.fc.wieght'?)" in message
    assert "2 not known: " in message and "blocks.12.fc.weight (3, 2)" in message
    assert "bias found (7,), expected ()" in message


@pytest.mark.parametrize("name", ["blocks.03.fc.weight", "blocks.3.moe.2.A", "xbias", "stem.weight.y"])
def test_no_stranger_slips_in(name):
    with pytest.raises(InputError, match="1 not known"):
        to_tree({**published(), name: np.zeros(1)}, TABLE, SHAPES)
    to_tree({**published(), name: np.zeros(1)}, TABLE, SHAPES, ignore=[r".*"])


def test_ignoring_does_not_excuse_a_missing_weight():
    arrays = published()
    del arrays["bias"]
    with pytest.raises(InputError, match=r"1 missing: bias \(\)"):
        to_tree(arrays, TABLE, SHAPES, ignore=[r".*"])


def test_long_lists_are_cut():
    with pytest.raises(InputError, match=r"38 missing: .* and 30 more"):
        to_tree({}, TABLE, SHAPES)


def test_faulty_tables_and_trees():
    with pytest.raises(ValueError, match="no rule for"):
        to_tree(published(), TABLE[1:], SHAPES)
    with pytest.raises(ValueError, match="two rules"):
        to_tree(published(), (*TABLE, Rule("b", "bias")), SHAPES)
    with pytest.raises(InputError, match=r"layers/fc/kernle \(did you mean 'layers/fc/kernel'"):
        to_arrays(unflatten({"layers/fc/kernle": np.zeros((1, 2, 3))}), TABLE)
    with pytest.raises(InputError, match="layers/fc/kernel has shape"):
        to_arrays(unflatten({"layers/fc/kernel": np.zeros((2, 3))}), TABLE)
