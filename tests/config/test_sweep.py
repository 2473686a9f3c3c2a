"""Sweep files: what comes in is checked, and what rows must have alike is alike."""

import dataclasses
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from tove_jax.config import Config, thaw
from tove_jax.config.derive import MERGE_GROUPS
from tove_jax.config.schema import AdapterConfig, MergeConfig, ToVEConfig
from tove_jax.config.sweep import Order, check, from_sweep_file
from tove_jax.errors import InputError

ROOT = Path(__file__).parents[2]
METHODS = str(ROOT / "configs/sweeps/methods.py")


def row(name, against=None, **changes):
    config = thaw(Config())
    for path, value in changes.items():
        if isinstance(value, ConfigDict):
            config[path] = value
        else:
            config.update_from_flattened_dict({path.replace("__", "."): value})
    return {"name": name, "config": config} | ({} if against is None else {"against": against})


def derived(name, of, **fields):
    return {"name": name, "of": of} | fields


def plain(**changes):
    return row("s", student__adapter__kind="none", **changes)["config"]


TOVE = {"method": ConfigDict(dataclasses.asdict(ToVEConfig()))}


def sweep(*rows, **changes):
    return {"baseline": "a", "seeds": (1, 2), "rows": list(rows)} | changes


def test_rows_are_frozen_and_know_what_they_add_to():
    found = check(sweep(row("a"), row("b", optim__lr=0.5), row("c", "b")), "file")
    assert [(one.name, one.against) for one in found.rows] == [("a", ""), ("b", "a"), ("c", "b")]
    assert found.rows[0].config == Config() and found.rows[1].config.optim.lr == 0.5
    assert (found.seeds, found.baseline) == ((1, 2), "a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (sweep(row("a"), row("a")), r"rows\[1\].name: 'a' is there twice"),
        (sweep(row("a"), row("A")), "'A' is there twice"),
        (sweep(row("a"), row("../b")), r"rows\[1\].name: expected letters"),
        (sweep(row("b")), "baseline: no row 'a'"),
        (sweep(row("a"), row("b", "c"), row("c")), "row 'b': against: no row 'c' above it"),
        (sweep(), "rows: expected a list of rows"),
        (sweep(row("a"), seeds=()), "seeds: expected different whole numbers"),
        (sweep(row("a"), seeds=(1, 1)), "seeds: expected different whole numbers"),
        (sweep(row("a"), seeds=(1, True)), "seeds: expected different whole numbers"),
        (sweep(row("a"), seed=(1,)), r"file.seed: no such field \(did you mean 'seeds'\?\)"),
        (sweep(row("a") | {"agains": "a"}), r"rows\[0\].agains: no such field"),
        (sweep({"name": "a"}), r"rows\[0\]: missing config"),
        ({"baseline": "a", "rows": [row("a")]}, "file: missing seeds"),
        ([row("a")], "expected a mapping"),
        (sweep(row("a", student__activation="relu")), "row 'a': config.student.activation: expected one of"),
        (sweep(row("a"), row("b", data__limit=9)), "row 'b': config.data: expected what row 'a' has"),
        (sweep(row("a"), row("b", student__width=64)), "config.student.width: expected what row 'a' has, 1024"),
        (sweep(row("a"), row("b", features__experts=("hed:112",))), "expected 'hed' as in row 'a'"),
        (sweep(row("a"), derived("b", "c", detached=["hed"])), "row 'b': of: no row 'c' above it"),
        (sweep(row("a"), derived("b", "b", merge={})), "row 'b': of: no row 'b' above it"),
        (sweep(row("a"), derived("b", "a", merge={}), derived("c", "b", merge={})), "'b' is derived of 'a'"),
        (sweep(row("a"), derived("b", "a")), "expected either detached or merge"),
        (sweep(row("a"), derived("b", "a", detached=["hed"], merge={})), "expected either detached or merge"),
        (sweep(row("a"), derived("b", "a", detached=["hed"])), "of 'a': detached: expected a run of ToVE"),
        (sweep(row("a", **TOVE), derived("b", "a", detached=[])), "detached: expected names of experts"),
        (sweep(row("a", **TOVE), derived("b", "a", detached=["head"])), "'head' is not attached"),
        (sweep(row("a"), derived("b", "a", merge={"losss": "mse"})), r"config.method.losss: no such field"),
        (sweep(row("a"), derived("b", "a", merge={"source": "x"})), "merge.source: is that of row 'a'"),
        (sweep(row("a"), derived("b", "a", merge={}, settings={"data.limit": 3})), "expected train.FIELD or optim"),
        (sweep(row("a"), derived("b", "a", merge={}, settings={"train.stpes": 3})), "config.train.stpes: no such"),
        (sweep(row("a"), derived("b", "a", merge={}) | {"config": Config()}), r"rows\[1\].config: no such field"),
        (sweep(row("a"), start=row("s")["config"]), "start: expected a plain tower that trains, found 'mole'"),
        (sweep(row("a"), start=plain(student__width=64)), "start.student.width: expected what the rows have, 1024"),
        (sweep(row("a", student__initialize="x"), start=plain()), "the rows start from student.initialize 'x'"),
        (sweep(row("a"), row("b"), orders=[("a", "c")]), r"orders\[0\]: no row 'c'"),
        (sweep(row("a"), orders=[("a", "a")]), "expected two rows, found 'a' twice"),
        (sweep(row("a"), orders=[("a",)]), r"orders\[0\]: expected \(worse row"),
    ],
)
def test_a_wrong_sweep_is_named(values, message):
    with pytest.raises(InputError, match=message):
        check(values, "file")


def test_derived_rows_have_the_settings_that_follow():
    settings = {"train.steps": 7, "optim.groups": (("student/.*", 1.0), ("teacher/.*", None))}
    found = check(
        sweep(
            row("a", **TOVE),
            derived("b", "a", detached=["hed"]),
            derived("c", "a", merge={"loss": "cosine"}, settings=settings),
            derived("d", "a", merge={}, against="b"),
            orders=[("b", "a", "a table"), ("c", "a")],
        ),
        "file",
    )
    a, b, c, d = found.rows
    assert [(one.of, one.against, one.detached) for one in found.rows] == [
        ("", "", ()), ("a", "a", ("hed",)), ("a", "a", ()), ("a", "b", ()),
    ]  # fmt: skip
    assert b.config.method.attached == ("clip", "efficientnet_lite0", "pp_ocr_det") and not b.config.method.attach_all
    assert isinstance(c.config.method, MergeConfig) and c.config.method.loss == "cosine"
    assert c.config.method.source_method == a.config.method and c.config.train.steps == 7
    assert c.config.method.text_weight == a.config.method.text_weight and c.config.optim.groups[0][1] == 1.0
    assert d.config.optim.groups == MERGE_GROUPS
    assert found.orders == (Order("b", "a", "a table"), Order("c", "a"))
    part = found.only(["b"])
    assert [one.name for one in part.rows] == ["a", "b"] and part.orders == (Order("b", "a", "a table"),)


def test_a_field_that_the_schema_lacks_is_named():
    wrong = row("a")
    wrong["config"].train.stpes = 3
    with pytest.raises(InputError, match=r"row 'a': config.train.stpes: no such field \(did you mean 'steps'\?\)"):
        check(sweep(wrong), "file")


def test_a_part_of_a_sweep():
    found = check(sweep(row("a"), row("b")), "file")
    part = found.only(["b"], [7])
    assert ([one.name for one in part.rows], part.seeds) == (["b"], (7,))
    assert found.only() == found
    with pytest.raises(InputError, match="--rows: no row 'bb'"):
        found.only(["bb"])
    with pytest.raises(InputError, match="--seeds"):
        found.only(seeds=[3, 3])


def test_files_that_are_not_sweeps(tmp_path):
    with pytest.raises(InputError, match="absent.py: no such file"):
        from_sweep_file(str(tmp_path / "absent.py"))
    file = tmp_path / "wrong.py"
    file.write_text("x = 1")
    with pytest.raises(InputError, match=r"expected a function get_sweep\(argument\)"):
        from_sweep_file(str(file))
    file.write_text("def get_sweep(arg):\n    return {}['rows']")
    with pytest.raises(InputError, match="wrong.py: get_sweep: 'rows'"):
        from_sweep_file(str(file))


def test_the_ablation_adds_one_thing_a_row():
    found = from_sweep_file(METHODS)
    rows = {one.name: one.config for one in found.rows}
    assert (
        list(rows)
        == (
            "plain adapter mole token teacher fine fine+score hawaii "
            "tove tove-one tove-detached tove-merged teacher-merged hawaii-merged"
        ).split()
    )
    assert (found.baseline, found.seeds) == ("plain", (1, 2, 3))

    def changed(name):
        def flat(values, prefix=""):
            for key, value in values.items():
                yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

        against = next(one.against for one in found.rows if one.name == name)
        ours, theirs = (dict(flat(dataclasses.asdict(rows[one]))) for one in (name, against))
        return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}

    assert changed("adapter") == {"method.target"}
    assert changed("mole") == {"student.adapter.kind"}
    assert changed("token") == {"method.token_weighting"}
    assert changed("teacher") == {"method.teacher_weighting"}
    assert changed("fine+score") == {"method.token_scoring"}
    assert changed("hawaii") == {"method.coarse"}
    assert rows["plain"].student.adapter == dataclasses.replace(rows["mole"].student.adapter, kind="none")
    assert rows["hawaii"].method.coarse and rows["hawaii"].method.token_scoring
    assert rows["hawaii"].features.experts == rows["plain"].features.experts == found.start.features.experts
    assert found.start.student.adapter.kind == "none" and found.start.train.steps == 2 * rows["plain"].train.steps
    assert all(order.below in rows and order.above in rows for order in found.orders)
    assert rows["tove-detached"].method.attached == () and len(rows["tove-one"].method.attached) == 2
    assert {rows[name].method.name for name in rows if name.endswith("merged")} == {"merge"}
    assert rows["hawaii-merged"].method.source_adapter == rows["hawaii"].student.adapter
    assert rows["tove"].student.adapter == dataclasses.replace(AdapterConfig(kind="none"))


def test_arguments_of_the_sweep():
    found = from_sweep_file(METHODS + ":smoke,steps=3")
    assert {one.config.train.steps for one in found.rows} == {3} and found.start.train.steps == 6
    assert found.rows[0].config.data.limit == 48
    with pytest.raises(InputError, match="config argument 'smok'"):
        from_sweep_file(METHODS + ":smok")
