import pytest

from tove_jax.errors import InputError
from tove_jax.plan import table as tables
from tove_jax.plan.chips import GIB, parse
from tove_jax.plan.report import READING
from tove_jax.plan.table import MARKS, TABLES, Row, line, main, read, write

ROW = TABLES["growing"][0]
FOUND = {
    "reading": READING,
    "topology": {"name": "v5e:4x4"},
    "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
    "batch": 64,
    "fits": True,
    "needed": GIB,
    "memory": {"total": 3 * GIB},
    "roofline": {
        "compute_s": 0.1,
        "memory_s": 0.2,
        "network_s": 0.05,
        "step_s": 0.25,
        "traffic": [
            {"link": "chip", "bytes": 5e9, "hidden_s": 0.01},
            {"link": "network", "bytes": 7e6, "hidden_s": 0.0},
        ],
    },
    "mfu": 0.4,
    "compile_s": 42.0,
}


def test_rows_have_names_of_their_own_and_topologies():
    rows = [row for found in TABLES.values() for row in found]
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        parse(row.topology, row.slices)


def test_a_line():
    cells = [cell.strip() for cell in line(ROW, FOUND).strip("|").split("|")]
    assert cells[0] == ROW.label and line(ROW, {**FOUND, "reading": 1}).startswith(f"| {ROW.label} † |")
    assert cells[1:] == [
        *("v5e:4x4", "1 x 16 x 1", "64", "3.0", "5.00", "7.0", "20%", "100 / 200 / 50", "250", "40%", "42")
    ]
    assert "**3.0**" in line(ROW, {**FOUND, "fits": False})
    short = line(ROW, {name: FOUND[name] for name in ("topology", "mesh", "batch", "needed")})
    assert "**1.0**" in short and short.count("|") == line(ROW, FOUND).count("|")


def test_what_is_planned_is_kept_and_written(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- plans growing: python -m tove_jax.plan.table -->\nold\n<!-- /plans -->\nafter\n")
    monkeypatch.setattr(tables, "PAGE", page)
    asked = []

    def plan(row):
        asked.append(row.key)
        if len(asked) > 1:
            raise InputError("no")
        return FOUND

    monkeypatch.setattr(tables, "plan", plan)
    words = ["growing", "--plans", str(tmp_path / "plans"), "--only", "none-v5e-16-4"]
    assert main(words) == 0 and main(words) == 0
    assert asked == [ROW.key]  # kept
    text = page.read_text()
    assert "old" not in text and line(ROW, FOUND) in text and text.endswith("<!-- /plans -->\nafter\n")
    assert main(["growing", "--plans", str(tmp_path / "plans"), "--only", "none-v5e-64-4"]) == 0
    assert "no" in capsys.readouterr().err and list(read(tmp_path / "plans", TABLES["growing"])) == [ROW.key]


def test_the_page_has_the_marks():
    text = (tables.PAGE).read_text()
    assert {found[2] for found in MARKS.finditer(text)} == set(TABLES)


def test_a_row_without_a_mesh_is_refused():
    with pytest.raises(
        InputError, match="no divisor of 16 heads lets .* = 256 rows divide over the rest of 15 devices.*; no mesh does"
    ):
        tables.plan(Row("x", "configs/move_kd_vit_l.py:language=none", "v5e:3x5"))


def test_write_leaves_a_page_without_marks_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    write(page, {})
    assert page.read_text() == "nothing\n"
