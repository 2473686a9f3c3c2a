"""A run whose folder lies in an object store, here fsspec's in memory: saved, killed, gone on with, read."""

import os
import shutil
import signal
import threading

import fsspec
import jax
import numpy as np
import pytest

from tests.train.conftest import ROOT, overrides
from tove_jax.cli.main import main
from tove_jax.errors import InputError
from tove_jax.files import mirror, remote
from tove_jax.files.bucket import Bucket
from tove_jax.hf.load import import_student
from tove_jax.train import metrics
from tove_jax.train.checkpoint import load_settings, load_student

URL = "memory://bucket/runs/one"


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mirror.reading.cache_clear()
    yield Bucket(URL)
    empty()
    mirror.reading.cache_clear()


def empty():
    system = fsspec.filesystem("memory")
    if system.exists("/bucket"):
        system.rm("/bucket", recursive=True)


@pytest.fixture
def tove(prepared):
    """Returns ``tove(*words)``: the status of a training command on a run in the bucket."""

    def run(*words, workdir=URL):
        config = [f"--config={ROOT}/configs/demo.py:smoke", *overrides(prepared)]
        return main(["train", f"--workdir={workdir}", *config, "--quiet", *words])

    return run


def losses(bucket, tmp_path):
    (tmp_path / "rows").write_bytes(bucket.read("metrics.jsonl"))
    return {row["step"]: row["loss/total"] for row in metrics.read_rows(tmp_path / "rows")}


def steps(bucket):
    return sorted(int(name[12:-5]) for name in bucket.sizes("checkpoints") if name.count("/") == 1)


class Killed(BaseException):
    """As if the process ended there."""


def test_gone_on_with_from_the_store_the_run_is_the_same(bucket, tove, tmp_path, monkeypatch, capsys):
    """Killed between the objects of a checkpoint, and stopped by SIGTERM; the local folder is lost each time."""
    assert tove() == 0
    unbroken, wanted = losses(bucket, tmp_path), load_student(mirror.reading(URL))[1]
    assert list(unbroken) == [1, 2, 3, 4, 5, 6] and steps(bucket) == [4, 6]
    assert "start/config.json" in bucket.sizes() and bucket.read("frozen.json")
    empty()
    mirror.reading.cache_clear()

    send, written = Bucket.write, metrics.MetricWriter.write

    def dying(self, name, data):
        if name == "checkpoints/4.json":  # all but the last object is there
            raise Killed
        send(self, name, data)

    monkeypatch.setattr(Bucket, "write", dying)
    with pytest.raises(Killed):
        tove()
    assert [name for name in bucket.sizes("checkpoints/4") if name.endswith(".part")] and steps(bucket) == [2]
    shutil.rmtree(tmp_path / "cache")

    fifth = threading.Event()

    def slow(self, name, data):
        if name == "checkpoints/4.json":
            assert fifth.wait(300), "the fifth step waited for what was being sent"
        send(self, name, data)

    def stopping(self, step, row):
        written(self, step, row)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 5:
            fifth.set()

    monkeypatch.setattr(Bucket, "write", slow)
    monkeypatch.setattr(metrics.MetricWriter, "write", stopping)
    capsys.readouterr()
    assert tove() == 143
    told = capsys.readouterr().err
    assert "resumed at step 2" in told and "SIGTERM: saved step 5, stopped" in told
    assert steps(bucket) == [4, 5]
    assert len({name.split("/")[2][:8] for name in bucket.sizes("checkpoints/4")}) == 1  # nothing of the killed one
    shutil.rmtree(tmp_path / "cache")

    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tove() == 0
    assert "resumed at step 5" in capsys.readouterr().err
    assert losses(bucket, tmp_path) == unbroken
    _, found, provenance = load_student(mirror.reading(URL))
    assert provenance["step"] == 6 and steps(bucket) == [5, 6]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)

    # What others do with it.
    assert main(["export", f"--workdir={URL}"]) == 0
    fields, student = import_student(f"{URL}/export")
    assert fields["image_size"] == 32 and "layers" in student
    assert tove(f"--config.train.start_from={URL}", "--config.train.steps=1", workdir=f"{URL}-next") == 0
    settings, origins = load_settings(mirror.reading(f"{URL}-next"))
    assert settings.train.start_from == URL and "source" in origins


def test_what_is_not_a_whole_run_is_told(bucket, capsys):
    assert main(["export", f"--workdir={URL}"]) == 2
    assert f"{URL}/checkpoints: no whole checkpoint here" in capsys.readouterr().err
    bucket.write("checkpoints/2/abc-00000-00000.part", b"1")
    with pytest.raises(InputError, match="runs/one/checkpoints: no whole checkpoint here"):
        load_student(mirror.reading(URL))
    bucket.write("checkpoints/2.json", b'{"format": "other"}')
    with pytest.raises(InputError, match="runs/one/checkpoints/2.json: not a checkpoint of ours: .* found other"):
        load_settings(mirror.reading(URL))


def test_a_path_of_a_store_stays_text():
    assert remote.folder(URL) == URL and remote.folder("runs/one").name == "one"
