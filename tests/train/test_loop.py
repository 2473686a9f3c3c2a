import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.conftest import xla_flags
from tests.train.conftest import ROOT, overrides
from tove_jax.config import from_file
from tove_jax.errors import InputError, NonFiniteError
from tove_jax.train import checkpoint, loop
from tove_jax.train.checkpoint import load_student
from tove_jax.train.loop import train
from tove_jax.train.metrics import read_rows
from tove_jax.train.state import flatten


def train_on_one(config, workdir):
    return train(config, workdir, progress=False, devices=jax.devices()[:1])


def losses(workdir):
    return {
        row["step"]: {k: v for k, v in row.items() if k.startswith(("loss", "optim"))}
        for row in read_rows(workdir / "metrics.jsonl")
    }


def parameters(workdir):
    return {path: np.asarray(leaf) for path, leaf in flatten(load_student(workdir)[1]).items()}


@pytest.fixture(scope="module")
def unbroken(prepared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    shutil.copytree(prepared / "start", workdir / "start")
    config = from_file(str(ROOT / "configs/demo.py:smoke"), overrides(prepared))
    assert train_on_one(config, workdir) == 0
    return workdir


def test_a_run_leaves_metrics_and_a_student(unbroken):
    rows = read_rows(unbroken / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(row["loss/total"]) for row in rows)
    summary = json.loads((unbroken / "metrics.json").read_text())
    assert summary["train/loss/first"] == rows[0]["loss/total"]
    assert summary["train/loss/last"] == rows[-1]["loss/total"]
    assert summary["perf/images_per_s"] > 0
    assert list((unbroken / "tensorboard").glob("events*"))
    config, params, provenance = load_student(unbroken)
    assert config.train.steps == 6 and set(params) == {"student", "method"}
    assert provenance["step"] == 6 and set(provenance) == {"start", "expert/clip", "expert/pp_ocr_det", "step"}


def test_a_finished_run_is_not_repeated(unbroken, configure, capsys):
    before = (unbroken / "metrics.jsonl").read_bytes()
    assert train_on_one(configure(), unbroken) == 0
    assert "done already" in capsys.readouterr().err
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def command(workdir, prepared):
    return [
        sys.executable, "-m", "tove_jax.cli.main", "train", f"--config={ROOT}/configs/demo.py:smoke", f"--workdir={workdir}", "--quiet",
        *overrides(prepared),
    ]  # fmt: skip


def until_step(process, workdir, step):
    for _ in range(1200):
        if any(row["step"] >= step for row in read_rows(workdir / "metrics.jsonl")) or process.poll() is not None:
            return
        time.sleep(0.05)
    raise AssertionError("the run wrote nothing in a minute")


def test_killed_and_resumed_equals_unbroken_to_the_bit(unbroken, run_folder, prepared, configure):
    env = {**os.environ, "XLA_FLAGS": xla_flags(devices=1)}
    process = subprocess.Popen(command(run_folder, prepared), stderr=subprocess.PIPE, text=True, env=env)
    until_step(process, run_folder, 3)
    process.kill()
    process.communicate()
    assert train_on_one(configure(), run_folder) == 0
    assert losses(run_folder) == losses(unbroken)
    mine, whole = parameters(run_folder), parameters(unbroken)
    for path in whole:
        np.testing.assert_array_equal(mine[path], whole[path], err_msg=path)


def test_sigterm_saves_first(unbroken, run_folder, configure, monkeypatch):
    saved = []
    save, fetch = checkpoint.Checkpoints.save, loop._Run.fetch

    def remembered(self, step, *rest):
        saved.append(step)
        return save(self, step, *rest)

    def interrupted(self):
        if len(self.records) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(self)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", remembered)
    monkeypatch.setattr(loop._Run, "fetch", interrupted)
    assert train_on_one(configure("--config.train.checkpoint_every=100"), run_folder) == 143
    assert len(saved) == 1 and saved[0] < 6
    monkeypatch.undo()
    assert train_on_one(configure(), run_folder) == 0
    assert losses(run_folder) == losses(unbroken)


def test_a_loss_that_is_not_finite_names_step_and_records(run_folder, configure):
    with pytest.raises(NonFiniteError, match=r"step 2: loss .*label\d") as caught:
        train_on_one(configure("--config.optim.lr=1e38", "--config.optim.warmup=0.0"), run_folder)
    kept = Path(re.search(r"is in (\S+)$", str(caught.value))[1])
    assert (kept / "trainable").is_dir()
    records = json.loads((kept / "data" / "metadata").read_text())["records"]
    assert len(records) == 8 and all(record in str(caught.value) for record in records)


# The gradient of a key's bias is zero but for rounding, which Adam with its default epsilon blows up
# to whole steps; with this one it stays rounding.
MESH_RUN = ["--config.student.adapter.dropout=0.0", "--config.optim.eps=1e-5", "--config.train.steps=3"]


@pytest.fixture(scope="module")
def on_one_device(prepared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("single")
    shutil.copytree(prepared / "start", workdir / "start")
    train_on_one(from_file(str(ROOT / "configs/demo.py:smoke"), overrides(prepared, *MESH_RUN)), workdir)
    return workdir


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_every_mesh_gives_the_same_losses_and_parameters(on_one_device, run_folder, configure, sizes):
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes, strict=True)]
    assert train(configure(*mesh, *MESH_RUN), run_folder, progress=False) == 0
    for step, row in losses(on_one_device).items():
        np.testing.assert_allclose(losses(run_folder)[step]["loss/total"], row["loss/total"], rtol=1e-5)
    one = parameters(on_one_device)
    for path, leaf in parameters(run_folder).items():
        np.testing.assert_allclose(leaf, one[path], atol=1e-4, err_msg=path)


def test_a_checkpoint_of_one_mesh_goes_on_on_another(on_one_device, run_folder, configure):
    shutil.copytree(on_one_device / "checkpoints", run_folder / "checkpoints")
    shutil.rmtree(run_folder / "checkpoints" / "3")
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    assert train(configure(*mesh, *MESH_RUN), run_folder, progress=False) == 0
    one = parameters(on_one_device)
    for path, leaf in parameters(run_folder).items():
        np.testing.assert_allclose(leaf, one[path], atol=1e-4, err_msg=path)


def test_a_run_folder_that_cannot_be_made(tmp_path, configure):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--workdir: cannot make .*Not a directory"):
        train_on_one(configure(), tmp_path / "file" / "run")


def test_a_batch_that_does_not_divide(tmp_path, configure):
    with pytest.raises(InputError, match="config.train.batch: 8 does not divide into accumulation 3"):
        train_on_one(configure("--config.train.accumulation=3"), tmp_path / "run")
