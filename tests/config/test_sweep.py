"""Sweep files: what comes in is checked, and what rows must have alike is alike."""

import dataclasses
from pathlib import Path

import pytest

from tove_jax.config import Config, thaw
from tove_jax.config.schema import AdapterConfig
from tove_jax.config.sweep import check, from_sweep_file, settings_of
from tove_jax.errors import InputError

ROOT = Path(__file__).parents[2]
METHODS = str(ROOT / "configs/sweeps/methods.py")


def row(name, against=None, **changes):
    config = thaw(Config())
    for path, value in changes.items():
        config.update_from_flattened_dict({path.replace("__", "."): value})
    return {"name": name, "config": config} | ({} if against is None else {"against": against})


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
    ],
)
def test_a_wrong_sweep_is_named(values, message):
    with pytest.raises(InputError, match=message):
        check(values, "file")


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
    assert list(rows) == "plain adapter mole token teacher prior fine fine+score hawaii tove".split()
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
    assert changed("prior") == {"method.teacher_prior"}
    assert changed("fine+score") == {"method.token_scoring"}
    assert changed("hawaii") == {"method.coarse"}
    assert rows["plain"].student.adapter == dataclasses.replace(rows["mole"].student.adapter, kind="none")
    assert (
        rows["hawaii"].method
        == check(
            {
                "baseline": "h",
                "seeds": (1,),
                "rows": [{"name": "h", "config": settings_of(ROOT / "configs/demo.py", "method=hawaii")}],
            },
            "demo",
        )
        .rows[0]
        .config.method
    )
    assert rows["tove"].student.adapter == dataclasses.replace(AdapterConfig(kind="none"))


def test_arguments_of_the_sweep():
    found = from_sweep_file(METHODS + ":smoke,steps=3")
    assert {one.config.train.steps for one in found.rows} == {3} and found.rows[0].config.data.limit == 48
    with pytest.raises(InputError, match="config argument 'smok'"):
        from_sweep_file(METHODS + ":smok")
