"""`tove bench`: sides take turns and must agree, time runs out in an orderly way, and what is found is written down."""

import copy
import json

import jax
import numpy as np
import pytest

from tove_jax.bench import cases, run, sections, torch_side
from tove_jax.bench.timing import Clock, Row, Spread, alternate, peak_flops, rows
from tove_jax.cli.main import main
from tove_jax.errors import InputError


def test_sides_take_turns_and_ratios_are_of_turns():
    order = []
    times = alternate({name: lambda name=name: order.append(name) for name in "ab"}, 3, Clock())
    assert order == ["a", "b"] * 4 and {name: len(seen) for name, seen in times.items()} == {"a": 3, "b": 3}
    found = rows("case", {"a": [1.0, 4.0, 2.0], "b": [2.0, 8.0, 5.0]}, 10, "images", flops=4e12)
    assert [row.ratio for row in found] == [1.0, 2.0] and found[0].seconds == Spread(2.0, 1.0, 4.0, 3)
    assert found[0].rate == 5.0 and found[0].facts == {"tflops": 2.0}
    # No peak is published of a processor, so nothing is said of its share.
    assert peak_flops() == 0.0


def test_turns_end_with_the_clock():
    calls = []
    late = Clock(1.0, began=-1e9)
    times = alternate({"a": lambda: calls.append(0)}, 9, late)
    assert late.left < 0 and len(times["a"]) == 1 and len(calls) == 2
    assert Clock().left == float("inf") and Clock(100.0).until(0.5).left < 51


@pytest.fixture(scope="module")
def step():
    config = cases.config_of("move_kd", "tiny", batch=2, dtype="float32", everything=True)
    made = cases.Step(config)
    return made, made()


def test_torch_computes_the_same_step(step):
    pytest.importorskip("torch")
    made, ours = step
    for way in ("released", "well"):
        other = torch_side.TorchStep(made.config, made.params, made.batch, way, everything=True, compiled=False)
        theirs = other.first()
        assert not torch_side.agree(ours, theirs, 1e-4), way
        # Its optimiser goes on as ours does.
        assert other()["loss/total"] < theirs["loss/total"]
    frozen = torch_side.TorchStep(made.config, made.params, made.batch, "released", everything=False, compiled=False)
    names = [name for name, parameter in frozen.model.named_parameters() if parameter.requires_grad]
    assert names and all(name.startswith("teachers.") or ".moe." in name for name in names)


def test_sides_that_differ_are_not_timed(step, monkeypatch):
    pytest.importorskip("torch")
    made, _ = step
    wrong = copy.copy(made)
    wrong.params = jax.tree.map(np.array, made.params)
    wrong.params["student"]["layers"]["mlp"]["adapter"]["up"]["b_bias"] += 1.0
    monkeypatch.setattr(cases, "Step", lambda config: wrong)
    with pytest.raises(InputError, match="case: torch as released computes something else, so it is not timed: loss"):
        sections._beside_torch("case", made.config, True, sections.SCALES["small"], Clock())
    assert torch_side.agree({"loss/total": 1.0, "optim/gradient_norm": 1.0}, {"loss/total": 1.0005, "optim/gradient_norm": 1.1}, 1e-3)  # fmt: skip


def fake(monkeypatch, *names):
    row = Row("one", "tove_jax", Spread(0.5, 0.4, 0.6, 5), 10, "images", 1.0, {"tflops": 1.5, "note": "a note"})

    def made(case, clock):
        if case == "broken":
            raise RuntimeError("no memory\nmore")
        return [row]

    listed = [sections.Case(name, lambda clock, name=name: made(name, clock)) for name in names]
    monkeypatch.setattr(sections, "step_cases", lambda scale: listed)


def test_what_is_found_is_written_down(monkeypatch, tmp_path, capsys):
    fake(monkeypatch, "fine", "broken")
    path = tmp_path / "found.json"
    assert main(["bench", "--only=step", f"--output={path}"]) == 0
    stored = json.loads(path.read_text())
    (row,) = stored["rows"]
    assert row["rate"] == 20.0 and row["seconds"]["runs"] == 5 and stored["versions"]["jax"] == jax.__version__
    assert stored["machine"]["platform"] == "cpu" and stored["machine"]["cores"] > 0
    assert stored["left_out"] == [{"section": "step", "case": "broken", "why": "RuntimeError: no memory"}]
    printed = capsys.readouterr().out
    assert "| one | tove_jax | 500 (400 to 600) | 20 images | 1.00 | 1.5 |  |  |  | a note |" in printed
    assert "- step: broken: RuntimeError: no memory" in printed
    # The cache of compiled programs is back.
    assert jax.config.values["jax_enable_compilation_cache"]
    assert main(["bench", "--only=step", f"--output={tmp_path}/none/found.json"]) == 2


def test_no_case_begins_when_time_is_up(monkeypatch):
    fake(monkeypatch, "fine", "late")
    found = run.bench(only=["step"], minutes=1e-9)
    assert not found["rows"] and [one["why"] for one in found["left_out"]] == ["out of time"] * 2


def test_cases_are_chosen_by_name():
    every = run.choose("cpu", [], False, None)
    assert tuple(every) == tuple(run.SECTIONS)
    assert tuple(run.choose("input", [], False, None)) == ("input",)
    hawaii = run.choose("gpu", ["hawaii L/14-336"], False, None)
    assert {name: len(found) for name, found in hawaii.items()} == {"step": 2}
    # A section's name is that section, though cases of others have it in theirs.
    assert tuple(run.choose("cpu", ["adapters", "codecs"], False, None)) == ("adapters", "input")
    for arguments in (["--only=stepp"], ["--suite=gpu2"], ["--suite=gpu"]):
        assert main(["bench", *arguments]) == 2


def test_the_gpu_suite_holds_what_the_goals_name():
    steps = [case.name for case in run.choose("gpu", ["step"], False, None)["step"]]
    assert steps[0] == "move_kd L/14-336 batch 64 bfloat16, adapters train" and len(steps) == len(set(steps)) == 10


def test_input_section(tmp_path):
    found = run.bench("input", small=True, folder=str(tmp_path))
    sides = {(row["case"], row["side"]) for row in found["rows"]}
    assert not found["left_out"] and ("store, warm", "copy in memory") in sides and len(sides) > 10
    assert list(tmp_path.iterdir()) == []
