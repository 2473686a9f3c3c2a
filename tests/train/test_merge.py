"""Merging a finished run into a plain tower: the one loop, what moves, what comes out, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from tove_jax.config import to_json
from tove_jax.config.schema import AdapterConfig
from tove_jax.errors import InputError
from tove_jax.hf import clip
from tove_jax.train.checkpoint import load_student
from tove_jax.train.loop import train
from tove_jax.train.merge import merge_settings
from tove_jax.train.state import flatten

SMALL = ["--config.method.teacher_prior=()", "--config.train.steps=2", "--config.train.log_every=1"]


def run(config, workdir):
    return train(config, workdir, progress=False, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def source(prepared, tmp_path_factory):
    """A finished MoVE-KD run whose tower and adapters have moved."""
    import shutil

    from tests.train.conftest import ROOT, overrides
    from tove_jax.config import from_file

    folder = tmp_path_factory.mktemp("source") / "run"
    shutil.copytree(prepared / "start", folder / "start")
    config = from_file(str(ROOT / "configs/demo.py:smoke"), overrides(prepared, *SMALL))
    assert train(config, folder, progress=False) == 0
    return folder


def settings(source, **changes):
    config = merge_settings(source)
    method = dataclasses.replace(config.method, **changes)
    return dataclasses.replace(config, method=method)


def leaves(tree):
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


def test_a_move_kd_run_merges_into_a_plain_tower(source, tmp_path):
    config = settings(source)
    assert config.student.adapter == AdapterConfig(kind="none") and config.method.source_adapter.kind == "mole"
    assert train(config, tmp_path, progress=False) == 0
    stored, params, provenance = load_student(tmp_path)
    assert to_json(stored) == to_json(config)
    assert {path: leaf.shape for path, leaf in leaves(params["student"]).items()} == clip.shapes(config.student)
    before = leaves(load_student(source)[1]["student"])
    jax.tree.map(np.testing.assert_array_equal, before, leaves(params["teacher"]["student"]))
    moved = {path for path, leaf in leaves(params["student"]).items() if not np.array_equal(leaf, before[path])}
    still = set(before) - moved
    assert {path for path in still if "adapter" not in path} == {"post_norm/scale", "post_norm/bias"}
    assert provenance["source"] and provenance["start"] == load_student(source)[2]["start"]


def test_an_unfinished_or_missing_source_is_refused(source, tmp_path):
    with pytest.raises(InputError, match="no checkpoints here"):
        merge_settings(tmp_path / "nothing")
