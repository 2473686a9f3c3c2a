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


def test_matrices_of_more_rows_than_a_strip():
    rng = np.random.default_rng(0)
    arrays = {f"blocks.{layer}.fc.weight": rng.normal(size=(130, 70)).astype(np.float32) for layer in range(2)}
    arrays |= {f"blocks.{layer}.conv": rng.normal(size=(67, 3, 2)).astype(np.float16) for layer in range(2)}
    table = (TABLE[1], Rule("blocks.{layer}.conv", "conv", (2, 0, 3, 1)))
    tree = to_tree(arrays, table, {"layers/fc/kernel": (2, 70, 130), "conv": (3, 2, 2, 67)})
    for layer in range(2):
        np.testing.assert_array_equal(tree["layers"]["fc"]["kernel"][layer], arrays[f"blocks.{layer}.fc.weight"].T)
        wanted = arrays[f"blocks.{layer}.conv"].transpose(1, 2, 0)
        np.testing.assert_array_equal(tree["conv"][:, layer], wanted)
    assert tree["conv"].dtype == np.float16 and tree["conv"].flags.c_contiguous


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


FUSED = (
    *(Rule("blocks.{layer}.qkv.weight", f"layers/{p}/kernel", (0, 2, 1), part=(i, 3)) for i, p in enumerate("qkv")),
    *(Rule("blocks.{layer}.qkv.bias", f"layers/{p}/bias", part=(i, 3)) for i, p in enumerate("qkv")),
    Rule("blocks.{layer}.rel_pos", "windowed/rel_pos", layers=(0, 1, 3)),
    Rule("blocks.{layer}.rel_pos", "global/rel_pos", layers=(2,)),
    Rule("pos_embed", "position_embed", lead=1),
    Rule("probe_and_query", "probe", part=(0, 2), lead=2),
    Rule("probe_and_query", "extra", part=(1, 2), lead=2),
)
FUSED_SHAPES = {f"layers/{p}/kernel": (4, 5, 2) for p in "qkv"} | {f"layers/{p}/bias": (4, 2) for p in "qkv"}
FUSED_SHAPES |= {"windowed/rel_pos": (3, 3), "global/rel_pos": (1, 7), "position_embed": (9, 5)}
FUSED_SHAPES |= {"probe": (5,), "extra": (5,)}


def test_fused_arrays_layer_subsets_and_leading_axes(assert_same):
    rng = np.random.default_rng(1)
    sizes = {"qkv.weight": (6, 5), "qkv.bias": (6,)}
    arrays = {f"blocks.{i}.{name}": rng.normal(size=size) for i in range(4) for name, size in sizes.items()}
    arrays |= {f"blocks.{i}.rel_pos": rng.normal(size=7 if i == 2 else 3) for i in range(4)}
    arrays |= {"pos_embed": rng.normal(size=(1, 9, 5)), "probe_and_query": rng.normal(size=(1, 1, 10))}
    tree = to_tree(arrays, FUSED, FUSED_SHAPES)
    assert {path: leaf.shape for path, leaf in flatten(tree).items()} == FUSED_SHAPES
    np.testing.assert_array_equal(tree["layers"]["k"]["kernel"][3], arrays["blocks.3.qkv.weight"][2:4].T)
    np.testing.assert_array_equal(tree["layers"]["v"]["bias"][1], arrays["blocks.1.qkv.bias"][4:])
    np.testing.assert_array_equal(tree["windowed"]["rel_pos"][2], arrays["blocks.3.rel_pos"])
    np.testing.assert_array_equal(tree["extra"], arrays["probe_and_query"][0, 0, 5:])
    assert_same(to_arrays(tree, FUSED), arrays)
    with pytest.raises(InputError, match=r"blocks.2.qkv.bias found \(5,\), expected \(6,\)"):
        to_tree({**arrays, "blocks.2.qkv.bias": np.zeros(5)}, FUSED, FUSED_SHAPES)
    with pytest.raises(InputError, match=r"pos_embed found \(9, 5\), expected \(1, 9, 5\)"):
        to_tree({**arrays, "pos_embed": np.zeros((9, 5))}, FUSED, FUSED_SHAPES)


def test_a_table_that_loses_a_part_is_refused():
    rng = np.random.default_rng(1)
    shapes = {path: shape for path, shape in FUSED_SHAPES.items() if path != "layers/k/bias"}
    with pytest.raises(ValueError, match=r"qkv.bias: its rules give the parts \[\(0, 3\), \(2, 3\)\]"):
        to_tree({}, FUSED, shapes)
    leaves = unflatten({path: rng.normal(size=shape) for path, shape in shapes.items()})
    with pytest.raises(ValueError, match=r"qkv.bias: its rules give the parts \[\(0, 3\), \(2, 3\)\]"):
        to_arrays(leaves, FUSED)
    with pytest.raises(ValueError, match="the rule names 3 layers, windowed/rel_pos holds 2"):
        to_tree({}, FUSED, {**FUSED_SHAPES, "windowed/rel_pos": (2, 3)})
    double = (*FUSED, Rule("blocks.{layer}.rel_pos", "other", layers=(2,)))
    with pytest.raises(ValueError, match="blocks.2.rel_pos: its rules give the parts"):
        to_tree({}, double, {**FUSED_SHAPES, "other": (1, 7)})
