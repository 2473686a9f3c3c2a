"""The line that says what a start took: written once, read back, and the clock behind it."""

import time

import jax
import pytest

import tove_jax
from tove_jax.train import started
from tove_jax.train.started import Start


@pytest.mark.parametrize("start", [Start(23.4, 11.0, 0.3, 1.9), Start(120.0)])
def test_what_is_told_is_read_back(start):
    assert str(start).startswith(f"train: first step done {start.whole} s after the start")
    assert Start.parse(f"{start}\n") == start
    assert ("compiling" in str(start)) == (start.compiling is not None)


def test_other_lines_are_no_starts():
    assert Start.parse("train: 79,094 trainable and 23,936 frozen parameters, batch 2, 1 steps\n") is None


def test_compiling_is_told_without_what_was_kept_and_once(monkeypatch, capsys):
    monkeypatch.setattr(started, "_compiling", None)
    monkeypatch.setattr(started, "_told", False)
    started.watch()
    counted = started._compiling
    try:
        started.watch()
        assert started._compiling is counted
        for event, seconds in ((started._HAD, 12.0), (started._READ, 4.0), ("/jax/else", 50.0), (started._HAD, 3.0)):
            jax.monitoring.record_event_duration_secs(event, seconds)
        started.tell()
        started.tell()
    finally:
        jax.monitoring.unregister_event_duration_listener(counted._add)
    (line,) = capsys.readouterr().err.splitlines()
    start = Start.parse(line)
    assert start.compiling == 11.0 and start.reading == 4.0 and start.step < 5.0
    assert abs(start.whole - started.process_seconds()) < 5.0


def test_jax_tells_of_a_program(monkeypatch):
    monkeypatch.setattr(started, "_compiling", None)
    monkeypatch.setattr(started, "_told", False)
    started.watch()
    try:
        jax.jit(lambda x: x + time.monotonic())(1.0)  # which no cache has
        assert started._compiling.seconds[started._HAD] > 0
    finally:
        jax.monitoring.unregister_event_duration_listener(started._compiling._add)


def test_a_process_is_older_than_its_import(monkeypatch):
    since_import = time.monotonic() - tove_jax.IMPORTED
    assert since_import < started.process_seconds() < since_import + 600
    # Where the system does not tell, the import counts.
    monkeypatch.setattr(started.os, "sysconf", lambda name: int("none"))
    assert started.process_seconds() == pytest.approx(since_import, abs=1.0)
