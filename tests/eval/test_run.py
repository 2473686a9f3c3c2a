"""Evaluating run folders: which settings count, and how results are kept."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tove_jax.config.schema import Config, DataConfig, EvalConfig, FeaturesConfig
from tove_jax.errors import InputError
from tove_jax.eval import run


def test_training_decides_what_and_the_caller_where():
    stored = Config(
        title="stored", data=DataConfig(held_out=0.3, limit=9, path="a"), features=FeaturesConfig(("clip",))
    )
    asked = Config(
        title="asked",
        data=DataConfig(held_out=0.1, path="b", cache="c"),
        features=FeaturesConfig(("hed",), path="f"),
        eval=EvalConfig(neighbours=7),
    )
    found = run.with_stored_settings(stored, asked)
    assert (found.title, found.data.held_out, found.data.limit, found.features.experts) == (
        "stored",
        0.3,
        9,
        ("clip",),
    )
    assert (found.data.path, found.data.cache, found.features.path, found.eval.neighbours) == (
        "b",
        "c",
        "f",
        7,
    )
    assert run.with_stored_settings(stored, None) is stored


def test_metrics_are_merged_and_stale_ones_leave(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"train/loss/last": 0.5, "eval/knn/gone": 1.0}')
    run.write_metrics(tmp_path, {"eval/knn/student": 0.25, "eval/feature_error/hed": float("nan")})
    assert json.loads(path.read_text()) == {"eval/knn/student": 0.25, "train/loss/last": 0.5}
    path.write_text("{")
    with pytest.raises(InputError, match="metrics.json: expected a JSON object"):
        run.write_metrics(tmp_path, {})
    assert path.read_text() == "{"


def _fake(accuracies, ids):
    def evaluate(config, workdir):
        (workdir / "eval").mkdir(parents=True, exist_ok=True)
        (workdir / "eval" / "predictions.json").write_text(json.dumps({"ids": ids[workdir.name]}))
        value = accuracies[workdir.name]
        metrics = {"eval/knn/student": value, "eval/knn/student_low": 0.0, "eval/majority": 0.2}
        run.write_metrics(workdir, metrics)
        return metrics

    return evaluate


def test_several_runs_give_mean_and_spread(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "metrics.json").write_text('{"train/loss/last": 1.0}')
    monkeypatch.setattr(run, "evaluate_run", _fake({"a": 0.5, "b": 0.6}, {"a": ["x"], "b": ["x"]}))
    found = run.evaluate_runs(None, folders)
    assert found["eval/seeds/count"] == 2
    assert found["eval/seeds/knn/student/mean"] == pytest.approx(0.55)
    assert found["eval/seeds/knn/student/std"] == pytest.approx(0.1 / 2**0.5)
    assert not any("low" in name or "majority" in name for name in found)
    kept = json.loads((folders[0] / "metrics.json").read_text())
    assert kept["train/loss/last"] == 1.0 and kept["eval/knn/student"] == 0.5 and kept["eval/seeds/count"] == 2
    monkeypatch.setattr(run, "evaluate_run", _fake({"a": 0.5, "b": 0.6}, {"a": ["x"], "b": ["y"]}))
    with pytest.raises(InputError, match="judged on other pictures"):
        run.evaluate_runs(None, folders)


def test_a_folder_without_a_checkpoint_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match="run `tove train` first"):
        run.evaluate_run(dataclasses.replace(Config()), tmp_path)
