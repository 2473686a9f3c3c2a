import json
import shutil

import jax
import numpy as np
import pytest

from tests.train.conftest import ROOT, overrides
from tove_jax.config import from_file
from tove_jax.errors import InputError
from tove_jax.train import checkpoint
from tove_jax.train.checkpoint import load_student
from tove_jax.train.loop import train
from tove_jax.train.state import TrainState, flatten

FROZEN = "--config.optim.groups=(('.*/adapter/.*', 1.0), ('method/.*', 0.5), ('student/.*', None))"


def run(config, workdir):
    return train(config, workdir, progress=False, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    shutil.copytree(prepared / "start", workdir / "start")
    config = from_file(str(ROOT / "configs/demo.py:smoke"), overrides(prepared, FROZEN, "--config.train.steps=2"))
    assert run(config, workdir) == 0
    return workdir


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def config(configure):
    return configure(FROZEN, "--config.train.steps=2")


def test_frozen_weights_are_the_starts_to_the_bit(trained):
    from tove_jax.hf.load import load_clip

    _, params, provenance = load_student(trained)
    start = flatten(load_clip(trained / "start")[1])
    student = flatten(params["student"])
    for path, leaf in start.items():
        np.testing.assert_array_equal(student[path], leaf, err_msg=path)
    assert sum("adapter" in path for path in student) and len(provenance["start"]) == 64
    assert not any("norm" in path.name for path in (trained / "checkpoints" / "2" / "trainable").iterdir())


def test_frozen_weights_are_written_beside_the_first_steps_and_are_there_before_one_is_saved(
    config, tmp_path, monkeypatch
):
    done = []

    class Writer:
        def save(self, path, tree):
            done.append(f"{path.name} begun")

        def close(self):
            done.append("frozen there")

    monkeypatch.setattr(checkpoint.ocp, "StandardCheckpointer", Writer)
    kept = checkpoint.Checkpoints(tmp_path, config, {})
    monkeypatch.setattr(kept._manager, "save", lambda step, **_: done.append(f"step {step}"))
    kept.save_frozen({"kernel": np.ones(1)})
    assert done == ["frozen begun"]
    kept.save(1, TrainState(np.int32(1), {}, {}, (), np.int32(-1)), {})
    kept.close()
    assert done == ["frozen begun", "frozen there", "step 1"]
    # A run that ends before it saves waits for them too.
    kept = checkpoint.Checkpoints(tmp_path, config, {})
    kept.save_frozen({"kernel": np.ones(1)})
    kept.close()
    assert done[3:] == ["frozen begun", "frozen there"]


def test_a_truncated_checkpoint_is_refused_with_its_path(copied, config):
    files = [p for p in (copied / "checkpoints" / "2" / "trainable").rglob("d/*") if p.is_file()]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=r"checkpoints/2/trainable: cannot be read, truncated or damaged"):
        load_student(copied)
    with pytest.raises(InputError, match=r"checkpoints/2(/trainable)?: cannot be read, truncated or damaged"):
        run(config, copied)


def test_a_checkpoint_with_a_part_missing_is_refused(copied, config):
    shutil.rmtree(copied / "checkpoints" / "2" / "meta")
    with pytest.raises(InputError, match=r"checkpoints/2: not a whole checkpoint of ours: meta missing"):
        run(config, copied)


def test_a_foreign_checkpoint_is_refused(copied, config):
    meta = copied / "checkpoints" / "2" / "meta" / "metadata"
    meta.write_text(json.dumps({"format": "other"}))
    with pytest.raises(InputError, match="not a checkpoint of ours: expected format .* found other"):
        run(config, copied)


def test_other_settings_are_refused_by_name(copied, configure):
    with pytest.raises(InputError, match=r"config.optim.lr was 0.002, is 0.5"):
        run(configure(FROZEN, "--config.train.steps=2", "--config.optim.lr=0.5"), copied)


def test_settings_that_change_no_number_may_differ(copied, configure):
    assert run(configure(FROZEN, "--config.train.steps=2", "--config.train.log_every=5"), copied) == 0


def test_another_start_is_refused(copied, config):
    from tove_jax.hf.export import save_start
    from tove_jax.hf.load import load_clip

    _, params = load_clip(copied / "start")
    shutil.rmtree(copied / "start")
    save_start(config, jax.tree.map(lambda x: np.asarray(x) * 2, params), copied / "start")
    with pytest.raises(InputError, match="extracted with weights"):
        run(config, copied)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="no checkpoints here; run `tove train` first"):
        load_student(tmp_path)
