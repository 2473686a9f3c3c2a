"""`tove import` and `tove export`, from the command line."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tove_jax.cli.export import export_run
from tove_jax.cli.main import main
from tove_jax.config.schema import Config, DataConfig, FeaturesConfig
from tove_jax.errors import InputError
from tove_jax.hf.export import export_student, save_start
from tove_jax.hf.load import import_student, load_clip


def test_import_of_an_export_is_exact(tmp_path, make_student, make_params, assert_same, capsys):
    student = make_student()
    params = make_params(student)
    export_student(Config(student=student), params, tmp_path / "a")
    assert main(["import", str(tmp_path / "a"), "--output", str(tmp_path / "b")]) == 0
    assert "experts  3 of rank 4" in capsys.readouterr().out
    assert_same(import_student(tmp_path / "b")[1], params)
    assert main(["import", str(tmp_path / "a"), "--output", str(tmp_path / "c"), "--plain", "--image-size", "42"]) == 0
    assert "experts  none" in capsys.readouterr().out
    fields, start = load_clip(tmp_path / "c")
    assert fields["image_size"] == 42 and start["position_embed"].shape == (37, 32)
    assert main(["import", str(tmp_path / "a"), "--output", str(tmp_path / "d"), "--image-size", "3"]) == 2
    assert not (tmp_path / "d").exists()


def test_import_of_the_released_adapter(tmp_path, golden, make_student, make_params, capsys):
    arrays, _, _ = golden("top1")
    student = make_student("none")
    save_start(Config(student=student), make_params(student), tmp_path / "clip")
    save_file(arrays, tmp_path / "mole_encoder.safetensors")
    command = ["import", str(tmp_path / "clip"), "--adapter", str(tmp_path / "mole_encoder.safetensors")]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    _, params = import_student(tmp_path / "out")
    np.testing.assert_array_equal(params["class_embed"], arrays["embeddings.class_embedding"])
    assert main([*command, "--output", str(tmp_path / "mole_encoder.safetensors")]) == 2
    assert "found a file" in capsys.readouterr().err


def test_export_of_a_run(tmp_path, make_student, make_params, assert_same, monkeypatch):
    from tove_jax.train import checkpoint

    student = make_student()
    params = make_params(student)
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    config = Config(
        title="Run",
        student=student,
        features=FeaturesConfig(experts=("clip", "hed:112")),
        data=DataConfig(source="folder", path=str(tmp_path / "pictures"), held_out=0.5),
    )
    asked = []

    def load_student(workdir, step=None):
        asked.append((workdir, step))
        return config, {"student": params, "method": {}}, {"step": 5, "expert/hed": "abcd" * 16}

    monkeypatch.setattr(checkpoint, "load_student", load_student)
    (tmp_path / "metrics.json").write_text(json.dumps({"eval/knn/student": 0.5}))
    assert export_run(config, tmp_path) == tmp_path / "export"
    assert asked == [(tmp_path, None)]
    assert_same(import_student(tmp_path / "export")[1], params)
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    for part in ("| steps | 5 |", "`eval/knn/student` | 0.5", "abcdabcdabcdabcd", "MIT", "trained on", "none: random"):
        assert part in card, part
    assert str(tmp_path) not in card
    gone = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(tmp_path / "gone")))
    assert export_run(gone, tmp_path, step=3, output=tmp_path / "x") == tmp_path / "x"
    assert asked[-1] == (tmp_path, 3)
    assert "trained on," not in (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "metrics.json").write_text("[")
    with pytest.raises(InputError, match="metrics.json: expected JSON"):
        export_run(None, tmp_path)
