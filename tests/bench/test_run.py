"""`tove bench`: sides take turns and must agree, time runs out in an orderly way, and what is found is written down."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import xla_flags
from tove_jax.bench import cases, run, sections, torch_side
from tove_jax.bench.timing import Clock, Row, Spread, Turn, alternate, peak_flops, rows
from tove_jax.cli.main import main
from tove_jax.errors import InputError
from tove_jax.plan.abstract import abstract_run


def test_sides_take_turns_and_ratios_are_of_turns():
    order = []
    times = alternate({name: lambda name=name: order.append(name) for name in "ab"}, 3, Clock())
    assert order == ["a", "b"] * 4 and {name: len(seen) for name, seen in times.items()} == {"a": 3, "b": 3}
    found = rows("case", {"a": [1.0, 4.0, 2.0], "b": [2.0, 8.0, 5.0]}, 10, "images", flops=4e12)
    assert [row.ratio for row in found] == [1.0, 2.0] and found[0].seconds == Spread(2.0, 1.0, 4.0, 3)
    assert found[0].rate == 5.0 and found[0].facts == {"tflops": 2.0}
    # What the processors did is told beside, where it was counted.
    turns = {"a": [Turn(1.0, 0.5)], "b": [Turn(9.0, 1.0)]}
    assert json.loads(json.dumps(run.as_json(rows("case", turns, 10, "images")[1])))["ratio"] == 9.0
    assert [row.facts for row in rows("case", turns, 10, "images")] == [
        {"cpu_s": 0.5, "cpu_ratio": 1.0},
        {"cpu_s": 1.0, "cpu_ratio": 2.0},
    ]
    # No peak is published of a processor, so nothing is said of its share.
    assert peak_flops() == 0.0


def test_turns_end_with_the_clock():
    calls = []
    late = Clock(1.0, began=-1e9)
    times = alternate({"a": lambda: calls.append(0)}, 9, late)
    assert late.left < 0 and len(times["a"]) == 1 and len(calls) == 2
    assert Clock().left == float("inf") and Clock(100.0).until(0.5).left < 51


@pytest.fixture(scope="module", params=["move_kd", "hawaii", "tove"])
def step(request):
    everything = request.param != "tove"  # whose CLIP is frozen
    config = cases.config_of(request.param, "tiny", batch=2, dtype="float32", everything=everything)
    made = cases.Step(config)
    return made, [made(), made()]


def test_torch_computes_the_same_steps(step):
    pytest.importorskip("torch")
    made, ours = step
    everything = made.config.method.name != "tove"
    assert ours[1]["loss/total"] < ours[0]["loss/total"] * (1 - 1e-3)
    for way in ("released", "well"):
        other = torch_side.TorchStep(made.config, made.params, made.batch, way, everything=everything)
        theirs = [other.first(), other()]
        # The second step is after one of the optimiser.
        assert not torch_side.agree(ours, theirs, 1e-5), way
        assert not other.note and other.memory_mib() is None
        frozen = torch_side.TorchStep(made.config, made.params, made.batch, way, everything=False)
        trained = [name for name, parameter in frozen.model.named_parameters() if parameter.requires_grad]
        assert trained and all(name.startswith("extra.") or ".moe." in name for name in trained)


@pytest.mark.parametrize("step", ["move_kd"], indirect=True)
def test_sides_that_differ_are_not_timed(step, monkeypatch):
    pytest.importorskip("torch")
    made, ours = step
    wrong = copy.copy(made)
    wrong.params = jax.tree.map(np.array, made.params)
    wrong.params["student"]["layers"]["mlp"]["adapter"]["up"]["b_bias"] += 1.0
    monkeypatch.setattr(cases, "Step", lambda config: wrong)
    with pytest.raises(InputError, match="case: torch as released computes something else, so it is not timed: step 1: loss"):  # fmt: skip
        sections._step("case", made.config, True, sections.scale_of("cpu", True), Clock())
    off = [ours[0], {**ours[1], "optim/gradient_norm": 1.1 * ours[1]["optim/gradient_norm"]}]
    assert torch_side.agree(ours, off, 1e-3).startswith("step 2: optim/gradient_norm")
    assert not torch_side.agree(ours, off, 1e-1)


@pytest.mark.parametrize("step", ["tove"], indirect=True)
def test_one_side_that_lacks_memory_is_left_out(step, monkeypatch):
    pytest.importorskip("torch")
    made, _ = step
    alone = copy.copy(made)
    monkeypatch.setattr(cases, "Step", lambda config: alone)

    def none_left(self):
        raise self.torch.OutOfMemoryError("too large")

    monkeypatch.setattr(torch_side.TorchStep, "_first", none_left)
    found = sections._step("case", made.config, False, sections.scale_of("cpu", True), Clock())
    assert [row.side for row in found] == ["tove_jax", "plain tower, its gradient"]
    assert found[0].facts["note"].startswith("torch as released: out of memory: too large; torch done well: out of")


def fake(monkeypatch, *names):
    row = Row(
        "one",
        "tove_jax",
        Spread(0.5, 0.4, 0.6, 5),
        10,
        "images",
        1.0,
        {"tflops": 1.5, "note": "a note", "cpu_s": 0.3, "cpu_ratio": 1.0},
    )

    def made(case, clock):
        if case == "broken":
            raise RuntimeError("no memory\nmore")
        if case == "wrong":
            raise InputError("something else")
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
    assert "| one | tove_jax | 500 (400 to 600) | 20 images | 1.00 | 300 (1.00) | 1.5 |  |  |  | a note |" in printed
    assert "- step: broken: RuntimeError: no memory" in printed
    assert stored["measured"] == [["step", "fine"]]
    # What is measured there is not measured again.
    assert main(["bench", "--only=step", f"--output={tmp_path}/more.json", f"--after={path}"]) == 1
    (left,) = json.loads((tmp_path / "more.json").read_text())["left_out"]
    assert left["case"] == "broken" and main(["bench", f"--after={tmp_path}/none.json"]) == 2
    # Sides that compute different things are no result, and the other cases still are.
    fake(monkeypatch, "wrong", "fine")
    assert main(["bench", "--only=step", f"--output={path}"]) == 2
    stored = json.loads(path.read_text())
    assert len(stored["rows"]) == stored["wrong"] == 1 and stored["left_out"][0]["why"] == "InputError: something else"
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
    # The tiny ones are the same cases, in the same dtype.
    small = run.choose("gpu", [], True, None)
    for name, found in run.choose("gpu", [], False, None).items():
        names = [case.name for case in small[name]]
        wanted = {"step": 5, "adapters": 2, "start": 1}.get(name, len(found))
        assert len(names) == len(set(names)) == wanted, name
    assert all("bfloat16" in case.name for case in small["step"] + small["adapters"] + small["export"])


@pytest.mark.slow
def test_every_case_of_the_gpu_suite_runs_small(monkeypatch):
    for module in ("torch", "transformers"):
        pytest.importorskip(module)
    monkeypatch.setenv("XLA_FLAGS", xla_flags(devices=1))  # of the runs that are started; two pictures are no more
    found = run.bench("gpu", small=True)
    assert not found["left_out"] and not found["wrong"]
    assert {row["section"] for row in found["rows"]} == set(run.SECTIONS)
    sides = {(row["section"], row["side"]) for row in found["rows"]}
    assert {("step", "torch as released"), ("step", "torch done well"), ("export", "MoLA, exported")} <= sides
    (fed,) = [row for row in found["rows"] if row["side"] == "loader and stores"]
    assert 0 <= fed["facts"]["waited"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_steps_have_their_shapes_at_full_size(suite):
    scale = sections.scale_of(suite, False)
    for size, batch in scale.students:
        for method in cases.TEACHERS:
            config = cases.config_of(method, size, batch=batch, dtype=scale.dtype)
            step = abstract_run(config)
            state, metrics = jax.eval_shape(step.step, step.state, step.batch, step.experts)
            assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, step.state)
            assert metrics["loss/total"].shape == ()


def test_input_section(tmp_path):
    names = ["loader", "stores", "codecs", "pictures"]
    found = run.bench("input", only=names, small=True, folder=str(tmp_path))
    sides = {(row["case"], row["side"]) for row in found["rows"]}
    assert not found["left_out"] and ("store, warm", "copy in memory") in sides and len(sides) > 10
    assert list(tmp_path.iterdir()) == []
