"""A second stage begins with exactly what the first one ended with, and anything else is refused by name."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.train.conftest import ROOT, overrides
from tove_jax.cli.export import export_run
from tove_jax.config import from_file
from tove_jax.errors import InputError
from tove_jax.experts.run import expert_cards
from tove_jax.hf.export import save_start
from tove_jax.hf.load import load_clip
from tove_jax.parallel import make_mesh
from tove_jax.train.checkpoint import Checkpoints, load_student
from tove_jax.train.initial import initial_parameters, initial_state
from tove_jax.train.loop import train
from tove_jax.train.merge import merge_settings
from tove_jax.train.metrics import read_rows
from tove_jax.train.optimizer import make_optimizer
from tove_jax.train.state import flatten, parameter_factors

# The stored features are cut as published, so the second stage's padding is left out.
SAME_VIEW = ("--config.features.views=published", "--config.student.view.fit=crop")
FILES = {
    "move_kd": "configs/move_kd_vit_l.py:smoke,preset=reference,language=none",
    "hawaii": "configs/hawaii_vit_l.py:smoke,language=none",
    "tove": "configs/demo.py:smoke,method=tove",
}


def settings(prepared, *more, stage=1, method="move_kd"):
    stage = "" if method == "tove" else f",stage={stage}"
    return from_file(f"{ROOT}/{FILES[method]}{stage}", overrides(prepared, *SAME_VIEW, *more, method=method))


def second(prepared, source, *more, method="move_kd"):
    return settings(prepared, f"--config.train.start_from={source}", *more, stage=2, method=method)


def taught_by(config, *experts):
    return dataclasses.replace(config, features=dataclasses.replace(config.features, experts=experts))


def begin(config, workdir):
    """Parameters before the first step, flat, and where they are from."""
    params, origins = initial_parameters(config, workdir, expert_cards(config, workdir))
    return {path: np.asarray(leaf) for path, leaf in flatten(params).items()}, origins


def end(workdir, step=None):
    return {path: np.asarray(leaf) for path, leaf in flatten(load_student(workdir, step)[1]).items()}


def same(a, b):
    assert set(a) == set(b)
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def finished(config, workdir, extra=None):
    """Writes a finished run whose parameters have all moved, without training it; returns them, flat."""
    params, origins = initial_parameters(config, workdir, expert_cards(config, workdir))
    random = np.random.default_rng(1)
    frozen = parameter_factors(config.optim, flatten(params))
    tree = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x if frozen["/".join(part.key for part in path)] is None else x + random.standard_normal(x.shape)
        ).astype(np.float32),
        params,
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state, _, _ = initial_state(config, tree, make_optimizer, mesh)
        checkpoints = Checkpoints(workdir, config, {**origins, **(extra or {})})
        checkpoints.save_frozen(state.frozen)
        checkpoints.save(config.train.steps, state, {})
        checkpoints.close()
    return end(workdir)


SHORT = ("--config.train.steps=2", "--config.train.checkpoint_every=1", "--config.train.log_every=1")
LONGER = ("--config.train.steps=3", "--config.train.checkpoint_every=1", "--config.train.log_every=1")


@pytest.fixture(scope="module")
def first(prepared, tmp_path_factory):
    """A finished stage 1, trained on eight devices."""
    folder = tmp_path_factory.mktemp("first") / "run"
    shutil.copytree(prepared / "start", folder / "start")
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    assert train(settings(prepared, *SHORT, *mesh), folder, progress=False) == 0
    return folder


@pytest.fixture(scope="module")
def after(prepared, first, tmp_path_factory):
    """A finished stage 2, trained on one device."""
    folder = tmp_path_factory.mktemp("second") / "run"
    assert train(second(prepared, first, *LONGER), folder, progress=False, devices=jax.devices()[:1]) == 0
    return folder


def test_stage_two_begins_with_stage_one_and_trains_everything(prepared, first, after, tmp_path):
    ended, start = end(first), {f"student/{p}": x for p, x in flatten(load_clip(first / "start")[1]).items()}
    tower = {path for path in ended if path.startswith("student/") and "/adapter/" not in path}
    same({path: ended[path] for path in tower}, start)  # stage 1 leaves the tower alone
    config = second(prepared, first, *LONGER)
    began, origins = begin(config, tmp_path)
    same(began, ended)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state, _, _ = initial_state(config, initial_parameters(config, tmp_path, expert_cards(config, tmp_path))[0],
                                    make_optimizer, mesh)  # fmt: skip
    same({path: np.asarray(leaf) for path, leaf in state.trainable.items()}, ended)
    assert not state.frozen
    moved = end(after)
    still = {path for path in moved if np.array_equal(moved[path], ended[path])}
    # The feature is the last layer's, without the final norm.
    assert {path for path in still if "bias" not in path} == {"student/post_norm/scale"}
    provenance = load_student(after)[2]
    assert provenance["source"] == origins["source"] and len(origins["source"]) == 64
    assert provenance["start"] == load_student(first)[2]["start"]
    # A start that was drawn comes along.
    assert (after / "start" / "model.safetensors").read_bytes() == (first / "start" / "model.safetensors").read_bytes()


def test_a_resumed_stage_two_equals_the_unbroken_one(prepared, first, after, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(after, folder)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"2", "3"}
    shutil.rmtree(folder / "checkpoints" / "3")
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)  # the source may have moved
    assert train(second(prepared, moved, *LONGER), folder, progress=False, devices=jax.devices()[:1]) == 0
    same(end(folder), end(after))
    rows = [read_rows(one / "metrics.jsonl")[-1]["loss/total"] for one in (folder, after)]
    assert rows[0] == rows[1]
    with pytest.raises(InputError, match="start_from: began with another run's parameters, this run begins without"):
        train(settings(prepared, *LONGER, stage=2), folder, progress=False, devices=jax.devices()[:1])
    shutil.rmtree(moved / "checkpoints" / "2")
    with pytest.raises(InputError, match="is at step 1 of 2"):
        train(second(prepared, moved, *LONGER), folder, progress=False, devices=jax.devices()[:1])
    finished(settings(prepared, "--config.train.seed=7"), moved)
    with pytest.raises(InputError, match='was trained with source "'):
        train(second(prepared, moved, *LONGER), folder, progress=False, devices=jax.devices()[:1])


def test_a_stage_two_run_is_merged(prepared, after):
    merged = merge_settings(after)
    assert merged.student.adapter.kind == "none" and merged.student.initialize == str(after / "start")
    params, origins = initial_parameters(merged, after.parent, {})
    assert "teacher" in params and origins["source"] != load_student(after)[2]["source"]


@pytest.mark.parametrize("with_adapters", [True, False])
def test_an_export_with_adapters_is_a_source(prepared, first, tmp_path, capsys, with_adapters):
    export_run(None, first, output=tmp_path / "export", encoder_adapters=with_adapters)
    config = second(prepared, tmp_path / "export")
    shutil.copytree(first / "start", tmp_path / "run" / "start")
    began, origins = begin(config, tmp_path / "run")
    ended = end(first)
    student = {path for path in ended if path.startswith("student/")}
    same({path: began[path] for path in student}, {path: ended[path] for path in student})
    told = capsys.readouterr().err
    if with_adapters:
        same(began, ended)
        assert not told and set(origins) == {"source", "start"}
    else:
        fresh = begin(settings(prepared, stage=2), tmp_path / "run")[0]
        for path in set(ended) - student:
            np.testing.assert_array_equal(began[path], fresh[path])
        assert "the export holds no parameters of the method: 4 drawn anew" in told


def test_teachers_that_are_gone_stay_behind_and_it_is_told(prepared, first, tmp_path, capsys):
    began, origins = begin(taught_by(second(prepared, first), "clip"), tmp_path)
    ended = end(first)
    same(began, {path: leaf for path, leaf in ended.items() if path.startswith("student/")})
    told = capsys.readouterr().err
    assert "left behind, since this run has no use for them: method/pp_ocr_det/channel/bias" in told
    assert set(origins) == {"source", "start", "expert/clip"}
    begin(second(prepared, first, "--config.method.clip_weight=0.5"), tmp_path)
    assert "settings that changed: config.method.clip_weight was 0.8, is 0.5" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_by_name(prepared, first, tmp_path):
    def refused(message, *more, source=first, **options):
        with pytest.raises(InputError, match=message):
            begin(second(prepared, source, *more, **options), tmp_path / "run")

    refused("start_from: .*here: expected a folder with config.json", source=tmp_path / "nothing" / "is" / "here")
    (tmp_path / "empty").mkdir()
    refused("expected a run .checkpoints. or an export .config.json., found neither", source=tmp_path / "empty")
    refused("expected a run of 'hawaii', found one of 'move_kd' in .*run", method="hawaii")
    refused(
        "config.student.adapter.alpha: expected 1.0, as .* was trained, found 2.0", "--config.student.adapter.alpha=2.0"
    )
    refused("config.student.adapter.kind: expected 'mole', .* found 'none'", "--config.student.adapter.kind=none")
    refused("config.student.adapter.routing: expected 'top1'", "--config.student.adapter.routing=dense")
    refused(
        r"of another shape: student/layers/mlp/adapter/down/a_bias found \(2, 3, 2\), expected \(2, 3, 3\)",
        "--config.student.adapter.rank=3",
    )
    more = taught_by(second(prepared, first), "clip", "pp_ocr_det:32", "hed:32")
    with pytest.raises(
        InputError, match=r"4 missing: method/hed/channel/bias \(32,\), method/hed/channel/kernel \(512"
    ):
        begin(more, tmp_path / "run")
    refused(
        r"4 missing: student/layers/mlp/adapter/ffn/a_bias .*; 8 not known: student/layers/mlp/adapter/down/a_bias",
        "--config.student.adapter.site=ffn",
    )
    other = tmp_path / "other"
    save_start(settings(prepared), jax.tree.map(lambda leaf: leaf + 1, load_clip(first / "start")[1]), other)
    refused("config.student.initialize: is not the start of", f"--config.student.initialize={other}")


def test_a_tower_frozen_in_bfloat16_is_handed_over_unrounded(prepared, first, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(prepared / "start", source / "start")
    config = settings(prepared, "--config.train.dtype=bfloat16")
    ended = finished(config, source)
    tower = [path for path in ended if path.startswith("student/") and "/adapter/" not in path]
    assert {ended[path].dtype for path in tower} == {np.dtype(ml_dtypes.bfloat16)}
    began, _ = begin(second(prepared, source), tmp_path / "run")
    start = flatten(load_clip(source / "start")[1])
    for path, leaf in began.items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, start[path.removeprefix("student/")] if path in tower else ended[path])


def test_experts_with_other_weights_are_refused(prepared, first, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(first, source)
    (meta,) = source.glob("checkpoints/2/meta/metadata")
    content = json.loads(meta.read_text())
    content["provenance"]["expert/pp_ocr_det"] = "0" * 64
    meta.write_text(json.dumps(content))
    with pytest.raises(InputError, match="pp_ocr_det.*weights"):
        train(second(prepared, source, *LONGER), tmp_path / "run", progress=False, devices=jax.devices()[:1])


@pytest.mark.parametrize("method", ["hawaii", "tove"])
def test_the_other_methods_hand_over_their_own_parameters(prepared, tmp_path, method):
    source = tmp_path / "source"
    shutil.copytree(prepared / "start", source / "start")
    ended = finished(settings(prepared, method=method), source)
    config = second(prepared, source, method=method)
    began, _ = begin(config, tmp_path / "run")
    same(began, ended)
    expected = {
        "hawaii": ("method/coarse/", "method/clip/"),
        "tove": ("method/gate/", "method/experts/", "method/caption"),
    }[method]
    for prefix in expected:
        assert any(path.startswith(prefix) for path in began), sorted(began)


def test_another_picture_size_resizes_the_position_embeddings_alone(prepared, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(prepared / "start", source / "start")
    plain = "--config.method.text_weight=0.0"
    ended = finished(settings(prepared, plain, method="tove"), source)
    config = second(prepared, source, plain, "--config.student.image_size=48", method="tove")
    began, origins = begin(config, tmp_path / "run")
    assert began.pop("student/position_embed").shape == (37, 32) and ended.pop("student/position_embed").shape == (
        17,
        32,
    )
    same(began, ended)
    assert "position embeddings resized from 32 to 48 px" in capsys.readouterr().err
    assert "expert/clip" not in origins


def test_a_caption_head_keeps_its_words(prepared, tmp_path):
    from tove_jax.data.vocabulary import Vocabulary
    from tove_jax.train.handover import handed_vocabulary

    words = Vocabulary(("cat", "dog"), 3)
    source = tmp_path / "source"
    shutil.copytree(prepared / "start", source / "start")
    plain = "--config.method.text_weight=0.0"
    config = settings(prepared, plain, method="tove")
    finished(config, source, {"vocabulary": words.hash})
    words.write(source)
    assert handed_vocabulary(config) is None
    begins = second(prepared, source, plain, method="tove")
    assert handed_vocabulary(begins) == words
    Vocabulary(("cat", "cow"), 3).write(source)
    with pytest.raises(InputError, match="expected the words the run was trained with"):
        handed_vocabulary(begins)
    export = dataclasses.replace(begins.train, start_from=str(tmp_path))
    assert handed_vocabulary(dataclasses.replace(begins, train=export)) is None
