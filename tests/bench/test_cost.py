"""The cost of a step by the compiler: what is counted, and that the pages hold what the command gives."""

import dataclasses
import math
from pathlib import Path

import jax
import pytest

from tove_jax.bench import cost
from tove_jax.config import from_file
from tove_jax.errors import InputError
from tove_jax.train.objective import count

ROOT = Path(__file__).parents[2]
TINY = ("width=32", "heads=2", "mlp_width=64", "image_size=28", "layers=5", "adapter.rank=2")


def tiny(arg="", name="move_kd_vit_l"):
    """A full-size config's step at a tiny size, its teachers CLIP and one more."""
    config = from_file(f"{ROOT}/configs/{name}.py:{arg}", [f"--config.student.{field}" for field in TINY])
    features = dataclasses.replace(config.features, experts=("clip", "convnext_xxl"))
    return dataclasses.replace(config, features=features)


def test_operations_are_those_of_all_layers():
    config = tiny("preset=reference")
    found = cost.step_cost(config, batch=2, compiled=False)
    assert found.temporaries is None
    in_float32 = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="float32"))
    step, *given = cost._abstract(in_float32, False, 2)  # five layers: a run of four, unrolled, and the last
    assert found.flops == pytest.approx(jax.jit(step).lower(*given).cost_analysis()["flops"], rel=1e-6)
    deeper = dataclasses.replace(config, student=dataclasses.replace(config.student, layers=24))
    shallower = dataclasses.replace(config, student=dataclasses.replace(config.student, layers=4))
    a_layer = found.flops - cost.step_cost(shallower, batch=2, compiled=False).flops
    more = cost.step_cost(deeper, batch=2, compiled=False).flops - found.flops
    assert a_layer > 0 and more == pytest.approx(19 * a_layer, rel=1e-6)


def test_state_and_what_trains():
    first, second = tiny("preset=reference"), tiny("preset=reference,stage=2")
    for config, factor in ((first, 2), (second, 12)):
        _, state, _ = cost._abstract(config, False, 2)
        # Float32 masters and two moments of what trains, bfloat16 of what does not, and three counters.
        assert bool(state.frozen) == (factor == 2)
        expected = 12 * count(state.trainable) + 2 * count(state.frozen)
        assert 0 <= cost.step_cost(config, batch=2, compiled=False).state - expected <= 16
    plain = cost.step_cost(first, plain=True, batch=2, compiled=False)
    _, state, batch = cost._abstract(cost.plain_clip(second), True, 2)
    assert not any("method" in path or "adapter" in path for path in state.trainable) and batch["features"] == {}
    one, two = (cost.step_cost(config, batch=2, compiled=False).flops for config in (first, second))
    assert one < two and plain.flops < two


def test_temporaries_grow_with_the_batch():
    small, large = (cost.step_cost(tiny("preset=reference"), batch=batch).temporaries for batch in (2, 16))
    assert 0 < small < large


def test_hawaii_runs_the_student_once_more_for_every_teacher():
    config = from_file(f"{ROOT}/configs/hawaii_vit_l.py:teachers=dagger")
    assert cost.student_passes(config) == 5
    assert cost.student_passes(from_file(f"{ROOT}/configs/move_kd_vit_l.py")) == 1


def test_an_expert_without_known_features_is_refused():
    config = tiny()
    odd = dataclasses.replace(config, features=dataclasses.replace(config.features, experts=("clip", "hed")))
    with pytest.raises(InputError, match="no features are known of 'hed'"):
        cost.step_cost(odd, compiled=False)
    assert cost.main(["move_dk"]) == 2


def test_tables_go_between_the_marks(tmp_path):
    page = tmp_path / "move_kd.md"
    page.write_text("# Page\n\n<!-- cost: python -m tove_jax.bench.cost -->\n<!-- /cost -->\n\nAfter.\n")
    for text in ("| a |\n", "| b |\n"):
        cost.write(tmp_path, {"move_kd": text})
    assert page.read_text() == (
        "# Page\n\n<!-- cost: python -m tove_jax.bench.cost -->\n\n| b |\n\n<!-- /cost -->\n\nAfter.\n"
    )
    page.write_text("no marks")
    with pytest.raises(InputError, match="expected one pair of marks"):
        cost.write(tmp_path, {"move_kd": "| a |\n"})
    assert page.read_text() == "no marks"


def lines(page):
    text = (ROOT / "docs/methods" / f"{page}.md").read_text()
    found = cost.MARKS.search(text)
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in found[2].strip().splitlines()[2:]]


@pytest.mark.parametrize("page", cost.PAGES)
def test_pages_have_every_row(page):
    written = lines(page)
    assert [cells[0] for cells in written] == [row.label for row in cost.PAGES[page]]
    plain = [float(cell) for cell in written[0][1:]]
    for cells in written:
        flops, beside, _, memory, more, _ = (float(cell) for cell in cells[1:])
        assert math.isclose(flops / plain[0], beside, abs_tol=2e-3) and math.isclose(
            memory / plain[3], more, abs_tol=6e-3
        )


def test_a_row_of_a_page_is_what_the_command_gives():
    row = next(row for row in cost.PAGES["tove"] if "token" in row.label)
    found = cost.step_cost(from_file(str(ROOT / row.config), row.overrides), compiled=False)
    (cells,) = (cells for cells in lines("tove") if cells[0] == row.label)
    assert float(cells[1]) == pytest.approx(found.flops / cost.BATCH / 1e9, rel=0.01)
    assert float(cells[6]) == pytest.approx(found.state / 2**20, rel=0.01)
