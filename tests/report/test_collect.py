"""Reading a run's folder, whole, partial and broken."""

from __future__ import annotations

import pytest

from tove_jax.config import Config
from tove_jax.errors import InputError
from tove_jax.report.collect import collect, read_history
from tove_jax.report.make import make_report


def test_a_whole_run_misses_nothing(fabricated):
    workdir, run = fabricated
    assert not run.missing
    assert len(run.history) == 150 and run.metrics["eval/knn/student"] == 0.58
    assert collect(workdir).experts == ("clip", "efficientnet_lite0", "hed", "pp_ocr_det")


def test_an_empty_folder_names_the_commands(tmp_path):
    run = collect(tmp_path, missing={"pictures": "no checkpoint"})
    assert "tove eval" in run.missing["evaluation"] and "tove train" in run.missing["training"]
    assert run.missing["pictures"] == "no checkpoint"
    with pytest.raises(InputError, match="expected a run's folder"):
        collect(tmp_path / "nothing")
    with pytest.raises(InputError, match="expected a run's folder"):
        make_report(tmp_path / "nothing", Config())
    assert not (tmp_path / "nothing").exists()


def test_a_line_cut_off_by_a_kill_is_left_out_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss/total": 2.0}\n{"step": 2, "loss/to')
    assert [row["step"] for row in read_history(path)] == [1]
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(InputError, match="line 2"):
        read_history(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(InputError, match="line 1.*no step"):
        read_history(path)


def test_broken_metrics_are_named(tmp_path):
    (tmp_path / "metrics.json").write_text("[1]")
    with pytest.raises(InputError, match="metrics.json: expected a JSON object, found list"):
        collect(tmp_path)
