"""The whole road on the demo's own pictures and experts, a few steps long, through the commands."""

import json
from pathlib import Path

import numpy as np
import pytest

from tove_jax.cli.main import main

ROOT = Path(__file__).parents[2]
CONFIG = f"--config={ROOT / 'configs/demo.py'}:smoke"
SMALL = ["--config.features.experts=('clip', 'efficientnet_lite0:64', 'hed:32', 'pp_ocr_det:32')"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("road") / "run"


def tove(command, workdir, *more):
    return main([command, CONFIG, f"--workdir={workdir}", *SMALL, *more])


def test_the_road(workdir, capsys):
    assert tove("data", workdir) == 0
    assert "Food & Drink" in capsys.readouterr().out
    for command in ("extract", "train", "eval", "export", "report"):
        assert tove(command, workdir) == 0, command
    assert main(["verify", str(workdir / "export")]) == 0
    assert {path.name for path in workdir.iterdir()} >= {
        "features",
        "checkpoints",
        "export",
        "report.html",
        "metrics.json",
    }

    metrics = json.loads((workdir / "metrics.json").read_text())
    for kind in ("knn", "probe"):
        for who in ("pixels", "init", "student", "clip", "efficientnet_lite0", "hed", "pp_ocr_det"):
            assert 0 <= metrics[f"eval/{kind}/{who}"] <= 1
    # The clip expert is the start's frozen copy.
    assert metrics["eval/knn/clip"] == pytest.approx(metrics["eval/knn/init"], abs=0.1)
    for name in ("train/loss/first", "train/loss/last", "perf/images_per_s", "perf/data_wait"):
        assert np.isfinite(metrics[name])


def test_the_report_stands_alone(workdir):
    page = (workdir / "report.html").read_text()
    assert "http-equiv" not in page and 'src="http' not in page and "data:image/" in page
    assert page.count("efficientnet_lite0") >= 2 and "OpenMoji" in page


def test_the_export_comes_back_bit_for_bit(workdir, tmp_path):
    assert main(["import", str(workdir / "export"), f"--output={tmp_path / 'again'}"]) == 0
    first, again = (folder / "model.safetensors" for folder in (workdir / "export", tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


def test_a_second_time_reuses_what_is_done(workdir, capsys):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("features/*/*.records")}
    rows = (workdir / "metrics.jsonl").read_bytes()
    assert before
    assert tove("extract", workdir) == 0 and tove("train", workdir) == 0
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("features/*/*.records")}
    assert rows == (workdir / "metrics.jsonl").read_bytes()


def test_features_of_another_size_are_refused_with_both_views(workdir, capsys):
    other = "--config.features.experts=('clip', 'efficientnet_lite0:96', 'hed:32', 'pp_ocr_det:32')"
    assert main(["train", CONFIG, f"--workdir={workdir}", other]) == 2
    assert "size is 64 in the store and 96 now" in capsys.readouterr().err


def test_a_typing_error_is_told_in_one_line(workdir, capsys):
    assert main(["train", CONFIG, f"--workdir={workdir}", "--config.optim.lrr=1"]) == 2
    assert capsys.readouterr().err.strip().endswith("config.optim.lrr: no such field (did you mean 'optim.lr'?)")
    assert main(["tarin"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
