"""The comparison runner: order, skipping, sharing, the mathematics of pairs, the table."""

from __future__ import annotations

import dataclasses
import json
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tove_jax.cli.main import main
from tove_jax.config.derive import detach, merged
from tove_jax.config.schema import (
    AdapterConfig,
    Config,
    EvalConfig,
    FeaturesConfig,
    StudentConfig,
    ToVEConfig,
    TrainConfig,
)
from tove_jax.config.sweep import Order, Row, Sweep
from tove_jax.errors import InputError
from tove_jax.eval import bootstrap, compare, comparison
from tove_jax.eval.compare_table import runs_table, table
from tove_jax.eval.run import Ground
from tove_jax.experts.extract import claim
from tove_jax.hf.load import load_clip
from tove_jax.models import vit
from tove_jax.report.compare import draw

BASE = Config(
    student=StudentConfig(initialize="clip-folder"),
    features=FeaturesConfig(("clip", "hed")),
    train=TrainConfig(steps=10, batch=4),
    eval=EvalConfig(resamples=50),
)
OTHER = dataclasses.replace(BASE, features=FeaturesConfig(("clip", "efficientnet_lite0:64")))
SWEEP = Sweep((Row("plain", BASE, ""), Row("more", OTHER, "plain"), Row("most", BASE, "more")), (1, 2), "plain")
# Answers of 8 pictures whose truth is 0: (row, seed) -> those that are right.
RIGHT = {
    ("plain", 1): "11000000", ("plain", 2): "11100000", ("more", 1): "11110000",
    ("more", 2): "11110000", ("most", 1): "11111100", ("most", 2): "01111110",
}  # fmt: skip


class House:
    """Stands in for extraction, training and evaluation, and remembers what was asked."""

    def __init__(self, status=None):
        self.calls = []
        self.status = status or {}
        self.ids = {}
        self.right = dict(RIGHT)

    def extract(self, config, workdir, *, progress):
        self.calls.append(("extract", config.features.experts, workdir.name))

    def train(self, config, folder, *, progress):
        name = f"{folder.parent.name}/{folder.name}"
        assert config.train.seed == int(folder.name.removeprefix("seed"))
        self.calls.append(("train", name))
        return self.status.get(name, 0)

    def ground(self, config, workdir):
        self.calls.append(("ground", config.features.experts))
        metrics = {"eval/knn/init": 0.25, "eval/knn/init_low": 0.1, "eval/probe/init": 0.125, "eval/majority": 0.5}
        return Ground(None, [], [], None, {}, metrics)

    def evaluate(self, config, folder, *, run, ground):
        row, seed = folder.parent.name, config.train.seed
        assert ground.metrics["eval/majority"] == 0.5
        self.calls.append(("evaluate", f"{row}/seed{seed}", *([run.parent.name] if run else [])))
        answers = [1 - int(digit) for digit in self.right[row, seed]]
        record = {"classes": ["x", "y"], "ids": self.ids.get(row, list("abcdefgh")), "truth": [0] * 8}
        record |= {"knn": {"student": answers}, "probe": {"student": answers[::-1]}}
        (folder / "eval").mkdir(parents=True, exist_ok=True)
        (folder / "eval" / "predictions.json").write_text(json.dumps(record))
        metrics = {"eval/knn/student": 1 - np.mean(answers), "eval/knn/student_low": 0.1, "train/loss/last": 3.0}
        (folder / "metrics.json").write_text(json.dumps(metrics))

    def go(self, workdir, sweep=SWEEP):
        self.calls.clear()
        parts = {"train": self.train, "evaluate": self.evaluate, "extract": self.extract, "ground": self.ground}
        return compare.run_sweep(sweep, workdir, **parts, progress=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compare")
    house = House()
    assert house.go(workdir) == 0
    return workdir, house.calls.copy()


def test_features_come_first_then_each_seed_of_all_rows(done):
    workdir, calls = done
    experts = ("clip", "hed", "efficientnet_lite0:64")
    assert calls[:2] == [("extract", experts, workdir.name), ("ground", experts)]
    wanted = [f"{row}/seed{seed}" for seed in (1, 2) for row in ("plain", "more", "most")]
    assert calls[2:] == [(what, name) for name in wanted for what in ("train", "evaluate")]
    assert not (workdir / "compare.lock").exists()


def test_what_is_done_is_left_alone(tmp_path):
    house = House({"more/seed2": 143})
    assert house.go(tmp_path) == 143  # stopped by a signal: neither judged nor followed by the next
    assert house.calls[-1] == ("train", "more/seed2")
    house.status.clear()
    house.go(tmp_path)
    names = [name for what, name, *_ in house.calls if what == "train"]
    assert names == ["more/seed2", "most/seed2"]
    house.go(tmp_path)
    assert house.calls == []
    # Answers that changed behind the record's back, other settings of evaluation, and of the training.
    answers = tmp_path / "plain/seed1/eval/predictions.json"
    answers.write_text(answers.read_text() + " ")
    house.go(tmp_path)
    assert house.calls[2:] == [("train", "plain/seed1"), ("evaluate", "plain/seed1")]
    (tmp_path / "plain/seed1/eval/compared.json").write_text("{")
    house.go(tmp_path)
    assert len(house.calls) == 4
    for change in ({"eval": EvalConfig(neighbours=3)}, {"train": TrainConfig(steps=11, batch=4)}):
        row = Row("plain", dataclasses.replace(BASE, **change), "")
        house.go(tmp_path, Sweep((row,), (1,), "plain"))
        assert house.calls[2:] == [("train", "plain/seed1"), ("evaluate", "plain/seed1")]


def test_two_comparisons_do_not_share_a_folder(tmp_path):
    with claim(tmp_path / "compare.lock"), pytest.raises(InputError, match="another `tove compare`"):
        House().go(tmp_path)


def test_runs_share_start_and_features_and_differ_in_their_seed(tmp_path):
    row = Row("plain", dataclasses.replace(BASE, student=StudentConfig()), "")
    config = compare.run_config(tmp_path, row, 7)
    assert config.student.initialize == str(tmp_path / "start")
    assert config.features.path == str(tmp_path / "features") and config.train.seed == 7
    assert compare.run_config(tmp_path, Row("plain", BASE, ""), 7).student.initialize == "clip-folder"
    assert compare.settings_hash(config) == compare.settings_hash(compare.run_config(tmp_path / "else", row, 7))
    assert compare.settings_hash(config) != compare.settings_hash(compare.run_config(tmp_path, row, 8))


def test_the_first_row_makes_the_start(tmp_path):
    student = StudentConfig(image_size=16, patch_size=8, width=16, layers=1, heads=1, mlp_width=16)
    house = House()
    row = Row("plain", dataclasses.replace(BASE, student=student), "")
    house.go(tmp_path, Sweep((row,), (1,), "plain"))
    assert list((tmp_path / "start").glob("*.safetensors"))


def test_the_difference_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    first, second = rng.random((5, 40)) < 0.7, rng.random((5, 40)) < 0.5
    found = comparison.paired_difference(first, second, 100)
    reference = scipy.stats.ttest_rel(first.mean(axis=1), second.mean(axis=1))
    interval = reference.confidence_interval(0.95)
    assert found.mean == pytest.approx(first.mean() - second.mean())
    assert (found.seed_low, found.seed_high) == pytest.approx((interval.low, interval.high))
    by_picture = bootstrap.bootstrap_mean(first.mean(axis=0) - second.mean(axis=0), 100)
    assert (found.low, found.high) == (by_picture.low, by_picture.high)


def test_the_difference_by_hand():
    first, second = [[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 1, 0, 0]]
    found = comparison.paired_difference(first, second, 0)
    assert (found.mean, found.low, found.high, found.seeds, found.above) == (0.25, 0.25, 0.25, 2, 1)
    assert found.std == pytest.approx(0.5 / 2**0.5)
    single = comparison.paired_difference(first[:1], second[:1], 10)
    assert (single.mean, single.std, single.seed_low, single.seed_high) == (0.5, None, None, None)
    # What both find hard cancels: rows that answer alike differ by nothing, with no doubt about it.
    same = comparison.paired_difference(first, first, 50)
    assert (same.mean, same.low, same.high, same.above) == (0, 0, 0, 0)
    with pytest.raises(InputError, match="two arrays"):
        comparison.paired_difference(first, second[:1], 0)


def test_what_is_collected(done):
    workdir, _ = done
    result = comparison.collect(SWEEP, workdir)
    assert json.loads((workdir / "compare.json").read_text()) == result
    assert [(one["row"], one["seed"]) for one in result["runs"]] == [
        (row, seed) for row in ("plain", "more", "most") for seed in (1, 2)
    ]
    assert result["runs"][0]["eval/knn/student"] == 0.25 and "eval/knn/student_low" not in result["runs"][0]
    assert {len(one["config"]) for one in result["runs"]} == {16}
    assert (result["missing"], result["pictures"]) == ([], 8)
    assert result["references"] == {"knn/init": 0.25, "probe/init": 0.125, "majority": 0.5}
    plain, more, most = result["rows"]
    assert plain["knn/mean"] == pytest.approx(2.5 / 8) and more["knn/mean"] == 0.5
    assert plain["knn/std"] == pytest.approx(0.125 / 2**0.5) and plain["pictures_seen"] == 40
    pairs = [(one["row"], one["against"]) for one in result["differences"] if one["task"] == "knn"]
    assert pairs == [("more", "plain"), ("most", "plain"), ("most", "more")]
    last = [one for one in result["differences"] if one["task"] == "knn"][-1]
    assert last["mean"] == pytest.approx(0.25) and (last["above"], last["seeds"]) == (2, 2)


def test_the_table_says_it_all(done):
    workdir, _ = done
    result = comparison.collect(SWEEP, workdir)
    text, page = table(result), table(result, markdown=True)
    assert "31.2 ± 8.8" in text and "most" in text and "more: +25.0 ± 0.0 (" in text and "2 of 2" in text
    assert "Seeds 1, 2; 8 held-out pictures" in text and "commonest label: 50.0 %" in text
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 + 1 and len({line.count("|") for line in rows}) == 1
    single = table(comparison.collect(dataclasses.replace(SWEEP, seeds=(1,)), workdir))
    assert "±" not in single.partition("\n\n")[0] and "50.0" in single
    assert [line.split("|")[1].strip() for line in rows[2:]] == ["plain", "more", "most", "start"]


def test_a_part_is_compared_over_the_seeds_that_both_have(tmp_path, done):
    workdir, _ = done
    wider = dataclasses.replace(SWEEP, seeds=(1, 2, 3))
    result = comparison.collect(wider, workdir)
    assert result["missing"] == ["plain/seed3", "more/seed3", "most/seed3"]
    assert {one["seeds"] for one in result["rows"]} == {2}
    assert "Not done: plain/seed3" in table(result)
    alone = comparison.collect(SWEEP.only(["more"]), workdir)
    assert alone["differences"] == [] and "50.0 ± 0.0" in table(alone)
    with pytest.raises(InputError, match="no run of the comparison is done"):
        comparison.collect(SWEEP, tmp_path)


def test_rows_judged_on_other_pictures_are_not_paired(tmp_path):
    house = House()
    house.ids["more"] = list("abcdefgi")
    house.go(tmp_path)
    with pytest.raises(InputError, match="more/seed1: was judged on other pictures than .*plain/seed1"):
        comparison.collect(SWEEP, tmp_path)


def test_the_plot_is_a_file_of_its_own(done):
    workdir, _ = done
    root = ElementTree.fromstring(draw(comparison.collect(SWEEP, workdir)))
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == space + "svg"
    charts = root.findall(space + "svg")
    assert [len(list(chart.iter(space + "circle"))) for chart in charts] == [3, 3]
    assert "--student:" in root.find(space + "style").text
    assert all(
        float(chart.attrib["y"]) + float(chart.attrib["height"]) <= float(root.attrib["height"]) for chart in charts
    )


def test_the_command(monkeypatch, tmp_path, done, capsys):
    workdir, _ = done
    monkeypatch.setattr("tove_jax.config.sweep.from_sweep_file", lambda path: SWEEP)
    assert main(["compare", "sweep.py", f"--workdir={workdir}", "--no-train"]) == 0
    assert "more: +25.0" in capsys.readouterr().out
    page = (workdir / "compare.md").read_text()
    assert page.startswith(f"`tove compare sweep.py --workdir={workdir}`") and "| most" in page
    assert (workdir / "compare.svg").read_text().startswith("<svg xmlns")
    monkeypatch.setattr("tove_jax.eval.compare.run_sweep", lambda *_, **__: 143)
    assert main(["compare", "sweep.py", f"--workdir={tmp_path}"]) == 143
    assert main(["compare", "sweep.py", f"--workdir={tmp_path}", "--rows", "no"]) == 2
    capsys.readouterr()
    assert main(["compare", "sweep.py", f"--workdir={tmp_path / 'new'}", "--dry-run"]) == 0
    assert "0 of 6 runs are done" in capsys.readouterr().out and not (tmp_path / "new").exists()


TOVE = dataclasses.replace(BASE, method=ToVEConfig(text_weight=0.0))
MERGED = merged(TOVE)
FAMILY = Sweep(
    (
        Row("full", TOVE, ""),
        Row("without", detach(TOVE, ["hed"]), "full", "full", ("hed",)),
        Row("whole", dataclasses.replace(MERGED, train=TrainConfig(steps=3, batch=2)), "full", "full"),
    ),
    (1, 2),
    "full",
    (Order("without", "full", "a paper"), Order("whole", "without")),
)


def family_house():
    house = House()
    house.right = {
        ("full", 1): "11111100", ("full", 2): "11111000", ("without", 1): "11110000", ("without", 2): "11100000",
        ("whole", 1): "11100000", ("whole", 2): "11110000",
    }  # fmt: skip
    return house


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    workdir, house = tmp_path_factory.mktemp("family"), family_house()
    assert house.go(workdir, FAMILY) == 0
    return workdir, house.calls.copy()


def test_a_derived_row_takes_the_run_of_its_row(family):
    workdir, calls = family
    assert calls[0] == ("extract", ("clip", "hed"), workdir.name)
    assert calls[2:7] == [
        ("train", "full/seed1"),
        ("evaluate", "full/seed1"),
        ("evaluate", "without/seed1", "full"),
        ("train", "whole/seed1"),
        ("evaluate", "whole/seed1"),
    ]
    config = compare.run_config(workdir, FAMILY.rows[2], 2)
    assert config.method.source == str(workdir / "full/seed2") and config.train.steps == 3
    assert config.method.source_method == TOVE.method and config.student.adapter.kind == "none"


def test_a_derived_row_is_done_again_when_its_run_answers_otherwise(tmp_path):
    house = family_house()
    house.go(tmp_path, FAMILY)
    house.go(tmp_path, FAMILY)
    assert house.calls == []
    (tmp_path / "full/seed1/eval/compared.json").unlink()
    assert [one.done for one in compare.states(FAMILY, tmp_path)] == [False] * 3 + [True] * 3
    # The same answers: what was derived of them still holds.
    house.go(tmp_path, FAMILY)
    assert house.calls[2:] == [("train", "full/seed1"), ("evaluate", "full/seed1")]
    (tmp_path / "full/seed1/eval/compared.json").unlink()
    house.right["full", 1] = "00000000"
    house.go(tmp_path, FAMILY)
    assert [name for what, name, *_ in house.calls if what == "evaluate"] == [
        "full/seed1", "without/seed1", "whole/seed1",
    ]  # fmt: skip


def test_the_table_and_the_plot_name_derived_rows_and_orders(family):
    workdir, _ = family
    result = comparison.collect(FAMILY, workdir)
    full, without, whole = result["rows"]
    assert (full["of"], without["of"], without["detached"], without["merged"]) == ("", "full", ["hed"], False)
    assert whole["merged"] and [row["pictures_seen"] for row in result["rows"]] == [40, 40, 46]
    text = table(result)
    assert "without: the runs of full, judged without hed." in text and "whole: the runs of full, distilled" in text
    assert "without < full (a paper)" in text and "+25.0 ± 0.0, above in 2 of 2" in text
    assert "whole" in draw(result) and "without" in draw(result)
    page = table(result, markdown=True)
    assert len([line for line in page.splitlines() if line.startswith("|")]) == 2 + 3 + 1 + 2 + 2
    first, second = (one for one in result["orders"] if one["task"] == "knn")
    assert (first["verdict"], second["verdict"]) == ("yes", "unclear")
    listed = runs_table(compare.states(FAMILY, workdir))
    assert "detaching hed from full" in listed and "merging full, 3 steps" in listed and "6 of 6 runs" in listed


def test_the_rule_of_the_verdict():
    rng = np.random.default_rng(0)
    better, worse = rng.random((4, 400)) < 0.7, rng.random((4, 400)) < 0.5
    up, down = comparison.paired_difference(better, worse, 10), comparison.paired_difference(worse, better, 10)
    assert (comparison.verdict(up), comparison.verdict(down)) == ("yes", "no")
    single = comparison.paired_difference(better[:1], worse[:1], 10)
    assert comparison.verdict(single) == "unclear"
    wide = comparison.paired_difference([[1, 1, 1, 1], [1, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 0, 0]], 10)
    assert wide.mean > 0 and comparison.verdict(wide) == "unclear"


def test_how_far_a_stopped_run_is(tmp_path):
    for step in ("4", "8"):
        (tmp_path / "plain/seed1/checkpoints" / step).mkdir(parents=True)
    assert "pending, saved at step 8 of 10" in runs_table(compare.states(SWEEP, tmp_path))


def test_references_of_other_settings_are_not_shown(family):
    workdir, _ = family
    assert compare.read_references(FAMILY, workdir)["eval/majority"] == 0.5
    other = dataclasses.replace(TOVE, eval=EvalConfig(neighbours=7))
    assert compare.read_references(Sweep((Row("full", other, ""),), (1,), "full"), workdir) == {}
    elsewhere = dataclasses.replace(TOVE, features=dataclasses.replace(TOVE.features, path="else"))
    assert compare.read_references(Sweep((Row("full", elsewhere, ""),), (1,), "full"), workdir)


def test_a_start_that_is_trained_is_trained_once_and_every_row_begins_there(monkeypatch, tmp_path):
    student = StudentConfig(
        image_size=16, patch_size=8, width=16, layers=1, heads=1, mlp_width=16, adapter=AdapterConfig(kind="none")
    )
    base = dataclasses.replace(BASE, student=student)
    start = dataclasses.replace(base, train=TrainConfig(steps=5, batch=4))
    sweep = Sweep((Row("plain", base, ""), Row("more", base, "plain")), (1,), "plain", start=start)
    params = vit.from_config(student).init(jax.random.key(3), jnp.zeros((1, 16, 16, 3)))["params"]
    monkeypatch.setattr(compare, "load_student", lambda folder: (start, {"student": params}, {}))
    house, trained = House({"start-run": 143}), []
    whole = house.train

    def train(config, folder, *, progress):
        if folder.name != "start-run":
            return whole(config, folder, progress=progress)
        trained.append((folder.name, config.train.steps))
        return house.status.get(folder.name, 0)

    house.train = train
    assert house.go(tmp_path, sweep) == 143 and not (tmp_path / "start").exists()
    house.status.clear()
    house.go(tmp_path, sweep)
    assert trained == [("start-run", 5)] * 2
    _, found = load_clip(tmp_path / "start", image_size=16)
    np.testing.assert_array_equal(found["class_embed"], params["class_embed"])
    assert [name for what, name, *_ in house.calls if what == "train"] == ["plain/seed1", "more/seed1"]
    (tmp_path / "more/seed1/eval/compared.json").unlink()
    house.go(tmp_path, sweep)
    assert len(trained) == 2
    # Runs from another start are not gone on with.
    (tmp_path / "more/seed1/eval/compared.json").unlink()
    other = dataclasses.replace(start, train=TrainConfig(steps=6, batch=4))
    for changed in (other, None):
        with pytest.raises(InputError, match="made in another way"):
            house.go(tmp_path, dataclasses.replace(sweep, start=changed))
