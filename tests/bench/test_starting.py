"""The section `start`: a run begun with an empty cache and with what was compiled there, and runs that fail."""

import sys

import pytest

from tests.conftest import xla_flags
from tove_jax.bench import run, starting
from tove_jax.bench.timing import Clock
from tove_jax.files.compiled import LEAST


def test_a_run_is_started_cold_and_warm(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", xla_flags(devices=1))
    monkeypatch.setenv(LEAST, "0")
    monkeypatch.setattr(starting, "WARM", 1)
    found = run.bench(only=["start"], small=True, folder=str(tmp_path))
    assert not found["left_out"] and list(tmp_path.iterdir()) == []
    cold, warm = found["rows"]
    assert (cold["side"], warm["side"]) == ("cache empty", "cache warm")
    for row in (cold, warm):
        assert (
            0 < row["facts"]["step_s"] + row["facts"]["compile_s"] + row["facts"]["read_s"] < row["seconds"]["median"]
        )
    # What was compiled is found again, the step too.
    assert cold["facts"]["read_s"] == 0
    assert warm["facts"]["compile_s"] < cold["facts"]["compile_s"] / 2
    assert warm["ratio"] == pytest.approx(warm["seconds"]["median"] / cold["seconds"]["median"])
    assert "s the step itself" in run.text(found)


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Returns ``scripted(script)``, which makes a shell script of every child process."""

    def replace(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        monkeypatch.setattr(starting, "prepare", lambda config, folder: None)

    return replace


def test_a_run_that_fails_is_left_out_with_what_it_wrote(scripted):
    scripted("echo one thing >&2; echo no features of clip >&2; exit 3")
    lines = []
    found = run.bench(only=["start"], small=True, told=lines.append)
    (left,) = found["left_out"]
    assert left["why"] == "tove train ended with status 3: no features of clip"
    assert not found["rows"] and not found["wrong"]
    assert "one thing\nno features of clip\n" in lines and not any("Traceback" in line for line in lines)


def test_a_run_that_fails_after_its_first_step_is_no_start(scripted, tmp_path):
    scripted("echo 'train: first step done 5.0 s after the start' >&2; echo disk full >&2; exit 2")
    with pytest.raises(starting.Unmeasured, match="status 2: disk full"):
        starting.start(tmp_path, Clock())
    scripted("echo 'train: first step done 5.0 s after the start' >&2")
    started = starting.start(tmp_path, Clock())
    assert started.told.whole == 5.0 and started.told.compiling is None and 0 < started.seconds < 5
    (row,) = [starting._row("case", "side", [started], started)]
    assert "note" not in row.facts and row.ratio == 1.0


def test_a_run_is_stopped_when_time_is_up(scripted):
    scripted("exec sleep 60")
    clock = Clock(0.5)
    found = run.bench(only=["start"], small=True, minutes=0.5 / 60)
    assert [left["why"] for left in found["left_out"]] == ["out of time"] and clock.left > -30
