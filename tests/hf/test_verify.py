"""`verify` agrees with a sound folder and finds what is wrong with a spoilt one."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tove_jax.cli.main import main
from tove_jax.config.schema import Config
from tove_jax.errors import InputError
from tove_jax.hf.export import export_student, save_start
from tove_jax.hf.verify import VerifyReport, _compare, verify
from tove_jax.models import block

PICTURES = [np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, make_student, make_params):
    folder = tmp_path_factory.mktemp("verify") / "out"
    student = make_student()
    params = make_params(student)
    export_student(Config(student=student), params, folder)
    return folder, params


@pytest.fixture
def spoilt(tmp_path, make_student, make_params):
    student = make_student()
    export_student(Config(student=student), make_params(student), tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def test_agrees_through_torch(exported):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder, params = exported
    report = verify(folder, params, PICTURES)
    assert report.ok and report.not_run is None, report.lines()
    assert report.differences["hidden_states[3]"] < 1e-5
    assert report.differences["image processor's pixels"] < 1e-5
    assert 0 < report.differences["attentions[-2] of CLS"] < 1e-5
    assert len(report.differences) == 8
    text = "\n".join(report.lines())
    assert report.file_hash in text and report.arrays_hash in text
    assert "agree to 0.0001" in text


def test_plain_start_agrees(tmp_path, make_student, make_params):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    student = make_student("none")
    save_start(Config(student=student), make_params(student), tmp_path)
    report = verify(tmp_path)
    assert report.ok and report.differences["pooler_output"] < 1e-5, report.lines()


def test_says_when_only_jax_was_checked(exported, no_torch):
    report = verify(exported[0], pictures=PICTURES)
    assert report.ok and not report.differences
    assert report.lines()[-1] == "ok, but only the JAX side was checked: torch is not installed"


def test_a_difference_is_found(exported, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setitem(block.ACTIVATIONS, "quick_gelu", block.ACTIVATIONS["gelu"])
    report = verify(exported[0], pictures=PICTURES)
    assert not report.ok and report.lines()[-1] == "FAILED"
    assert any("hidden_states[1] differs by" in problem for problem in report.problems)
    assert not any("hidden_states[0]" in problem for problem in report.problems)


def test_changed_weights_are_found(spoilt, make_student, make_params, no_torch):
    path = spoilt / "model.safetensors"
    with safe_open(path, "np") as file:
        arrays, metadata = file.get_tensors(), file.metadata()
    arrays["post_layernorm.bias"] = arrays["post_layernorm.bias"] + np.float32(1e-6)
    save_file(arrays, path, metadata=metadata)
    report = verify(spoilt, make_params(make_student()), PICTURES)
    assert len(report.problems) == 2
    assert "the file records" in report.problems[0]
    assert report.problems[1] == "post_norm/bias: differs from the given parameters"


def test_not_finite_is_found(tmp_path, make_student, make_params, no_torch):
    student = make_student("none")
    params = make_params(student)
    params["layers"]["mlp"]["fc1"]["kernel"][1, 0, 0] = np.inf
    save_start(Config(student=student), params, tmp_path)
    report = verify(tmp_path, pictures=PICTURES)
    assert "hidden_states[2]: not finite in JAX" in report.problems
    assert "hidden_states[1]: not finite in JAX" not in report.problems


def test_foreign_code_is_not_run(spoilt):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    path = spoilt / "modeling_mole_clip.py"
    trace = spoilt / "trace"
    path.write_text(f"open({str(trace)!r}, 'w')\n" + path.read_text())
    report = verify(spoilt, pictures=PICTURES)
    assert not trace.exists()
    assert "modeling_mole_clip.py differs from this package: its code was not run" in report.problems[0]
    path.unlink()
    assert "is missing" in verify(spoilt, pictures=PICTURES).problems[0]


def test_redirected_code_is_not_run(spoilt):
    """config.json must not lead transformers to another file of code."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    trace = spoilt / "trace"
    (spoilt / "other.py").write_text(f"open({str(trace)!r}, 'w')\n")
    config = spoilt / "config.json"
    config.write_text(config.read_text().replace('"modeling_mole_clip.', '"other.'))
    report = verify(spoilt, pictures=PICTURES)
    assert not trace.exists()
    assert report.problems[0].startswith("config.json: auto_map is")


def test_command(exported, spoilt, capsys, no_torch):
    assert main(["verify", str(exported[0])]) == 0
    assert "only the JAX side was checked" in capsys.readouterr().out
    path = spoilt / "model.safetensors"
    with safe_open(path, "np") as file:
        arrays, metadata = file.get_tensors(), file.metadata()
    save_file(arrays, path, metadata={**metadata, "tove_hash": "0" * 64})
    assert main(["verify", str(spoilt)]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main(["verify", str(spoilt / "none")]) == 2
    with pytest.raises(InputError, match="no such folder"):
        verify(spoilt / "none")


def test_a_tied_router_is_told_and_excuses_one_picture_only(tmp_path):
    ours = {"hidden_states[0]": np.zeros((3, 2))}
    theirs = {"hidden_states[0]": np.array([[0.0, 1e-5], [0.0, 1.0], [0.0, 0.0]])}
    tied, clear = np.array([1e-3, 1e-7, 1e-3]), np.array([1e-3, 1e-3, 1e-7])
    report = VerifyReport(tmp_path, tmp_path)
    _compare(report, ours, theirs, tied)
    assert report.ok and report.differences["hidden_states[0]"] == 1e-5
    assert report.notes == ["picture 1 left out: a router's two best differ by 1.0e-07 only"]
    for margins in (clear, None):
        report = VerifyReport(tmp_path, tmp_path)
        _compare(report, ours, theirs, margins)
        assert not report.ok
    report = VerifyReport(tmp_path, tmp_path)
    _compare(report, ours, {"hidden_states[0]": np.ones((3, 2))}, np.full(3, 1e-9))
    assert not report.ok
    report = VerifyReport(tmp_path, tmp_path)
    _compare(report, ours, {"hidden_states[0]": np.full((3, 2), np.nan)}, None)
    assert not report.ok


@pytest.mark.parametrize(("value", "ok"), [(0.5, False), (300.0, True)])
def test_tolerance_is_relative_for_large_values(tmp_path, value, ok):
    report = VerifyReport(tmp_path, tmp_path)
    ours = {"pooler_output": np.full((1, 2), value)}
    _compare(report, ours, {"pooler_output": ours["pooler_output"] + 2e-3}, None)
    assert report.ok == ok
