"""Merging a finished run into a plain tower: the one loop, what moves, what comes out, what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests.train.conftest import ROOT, overrides
from tove_jax.cli.export import export_run
from tove_jax.cli.main import main
from tove_jax.config import from_file, to_json
from tove_jax.config.derive import detach
from tove_jax.config.schema import AdapterConfig, MoveKDConfig
from tove_jax.errors import InputError
from tove_jax.eval.run import evaluate_run, prepare_ground
from tove_jax.hf import clip
from tove_jax.hf.export import save_start
from tove_jax.hf.load import load_clip
from tove_jax.methods import merge
from tove_jax.models import vit
from tove_jax.train.checkpoint import load_settings, load_student
from tove_jax.train.loop import train
from tove_jax.train.merge import merge_settings
from tove_jax.train.metrics import read_rows
from tove_jax.train.state import flatten

SMALL = ["--config.train.steps=2", "--config.train.log_every=1"]
CONFIG = f"{ROOT / 'configs/demo.py'}:smoke"


def run(config, workdir):
    return train(config, workdir, progress=False, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def source(prepared, tmp_path_factory):
    """A finished MoVE-KD run whose tower and adapters have moved."""
    folder = tmp_path_factory.mktemp("source") / "run"
    shutil.copytree(prepared / "start", folder / "start")
    config = from_file(CONFIG, overrides(prepared, *SMALL))
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


@pytest.fixture(scope="module")
def tove_source(prepared, tmp_path_factory):
    """A finished ToVE run with two experts and a caption head."""
    folder = tmp_path_factory.mktemp("tove") / "run"
    shutil.copytree(prepared / "start", folder / "start")
    pictures = folder.parent / "pictures"
    shutil.copytree(prepared / "pictures", pictures)
    names = [str(path.relative_to(pictures)) for path in pictures.rglob("*.png")]
    (pictures / "captions.json").write_text(json.dumps({name: f"noise of {name.split('/')[0]}" for name in names}))
    told = ["--config.method.vocabulary_count=1", f"--config.data.path={pictures}"]
    config = from_file(
        f"{ROOT / 'configs/demo.py'}:method=tove,smoke", overrides(prepared, *SMALL, *told, method="tove")
    )
    assert run(config, folder) == 0
    return folder


def test_a_tove_run_is_merged_judged_exported_and_reported_by_the_commands(tove_source, tmp_path, capsys):
    folder = tmp_path / "merged"
    assert main(["merge", str(tove_source), f"--workdir={folder}", "--quiet", "--config.method.blocks=1"]) == 0
    stored, params, _ = load_student(folder)
    assert stored.method.blocks == 1 and stored.method.text_weight == 1 and stored.method.source_method.name == "tove"
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[0]["loss/text"] > 0 and np.isfinite(rows[-1]["merge/error"])
    before, after = leaves(load_student(tove_source)[1]["student"]), leaves(params["student"])
    for path, leaf in after.items():
        kept = leaf[:1] if path.startswith("layers/") else leaf
        np.testing.assert_array_equal(kept, before[path][: len(kept)], err_msg=path)
    assert not np.array_equal(after["layers/mlp/fc1/kernel"][1], before["layers/mlp/fc1/kernel"][1])

    capsys.readouterr()
    assert main(["eval", f"--workdir={folder}", "--config.eval.neighbours=3", "--config.eval.resamples=5"]) == 0
    table = capsys.readouterr().out
    assert "student minus the run it merges, k-NN" in table and "squared error of the tokens" in table
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("student", "source", "init", "pixels"):
        assert 0 <= metrics[f"eval/knn/{name}"] <= 1 and 0 <= metrics[f"eval/probe/{name}"] <= 1
    lost = metrics["eval/knn/student"] - metrics["eval/knn/source"]
    assert metrics["eval/knn/student_minus_source"] == pytest.approx(lost)
    assert 0 < metrics["eval/merge/error/merged"] < metrics["eval/merge/error/tower"]
    # The start is the source's: none was drawn here.
    assert not (folder / "start").exists() and not (folder / "features").exists()

    file = f"--config={ROOT / 'configs/demo.py'}:method=tove,smoke"
    assert main(["export", file, f"--workdir={folder}"]) == 0 and not (folder / "start").exists()
    settings = json.loads((folder / "export" / "config.json").read_text())
    assert settings["architectures"] == ["CLIPVisionModel"] and "auto_map" not in settings
    assert "distilled by ToVE, then merged into one tower, from" in (folder / "export" / "README.md").read_text()
    assert main(["report", f"--workdir={folder}", "--pictures=0"]) == 0
    assert "the run that was merged" in (folder / "report.html").read_text()


def test_a_run_is_judged_without_its_experts_and_beside_what_was_judged_before(tove_source, tmp_path):
    stored = load_settings(tove_source)[0]
    stored = dataclasses.replace(
        stored,
        student=dataclasses.replace(stored.student, initialize=str(tove_source / "start")),
        eval=dataclasses.replace(stored.eval, neighbours=3, resamples=5),
    )
    ground = prepare_ground(stored, tmp_path)
    assert {"eval/knn/pixels", "eval/knn/init", "eval/knn/clip"} <= set(ground.metrics)
    assert "eval/linear_error/init/clip" in ground.metrics and "eval/knn/student" not in ground.metrics

    bare = evaluate_run(detach(stored, stored.features.names), tmp_path, run=tove_source, ground=ground)
    # Without experts the tokens are the start's own.
    assert bare["eval/knn/student_minus_init"] == 0 and bare["eval/knn/student"] == ground.metrics["eval/knn/init"]
    assert "eval/knn/init" not in bare and "eval/linear_error/student/clip" in bare
    answers = json.loads((tmp_path / "eval" / "predictions.json").read_text())
    assert list(answers["knn"]) == ["student"] and not (tmp_path / "checkpoints").exists()
    # With all of them it is what the run's own evaluation says.
    whole = evaluate_run(stored, tmp_path / "whole", run=tove_source, ground=ground)
    own = evaluate_run(stored, tove_source)
    assert all(own[name] == value for name, value in (whole | ground.metrics).items())


def test_commands_without_a_config_file_want_a_trained_run(source, tmp_path, capsys):
    assert main(["eval"]) == 2 and "expected --config, or --workdir with a trained run" in capsys.readouterr().err
    assert main(["export", f"--workdir={tmp_path}"]) == 2 and "no checkpoints here" in capsys.readouterr().err
    assert main(["merge", str(source), "--config.method.losss=mse"]) == 2
    assert "config.method.losss: no such field (did you mean 'method.loss'?)" in capsys.readouterr().err
    assert main(["merge", str(source), "--config.method.loss=l1"]) == 2
    assert "config.method.loss: expected one of 'mse', 'cosine'" in capsys.readouterr().err
    # A field of another method.
    assert main(["merge", str(source), "--config.method.hidden=3"]) == 2
    assert "tove merge" in capsys.readouterr().err and not (source / "merged").exists()


def test_fewer_experts_may_be_attached_than_the_source_has(tove_source, tmp_path):
    one = dataclasses.replace(merge_settings(tove_source).method.source_method, attach_all=False, attached=("clip",))
    config = settings(tove_source, source_method=one)
    assert run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1)), tmp_path) == 0
    origins = load_student(tmp_path)[2]
    assert origins["expert/clip"] and not (tmp_path / "features").exists()
    wider = dataclasses.replace(
        config, method=dataclasses.replace(config.method, source_method=dataclasses.replace(one, hidden=3))
    )
    with pytest.raises(InputError, match="source_method.hidden: expected 192, as .* was trained, found 3"):
        run(wider, tmp_path / "other")


def test_the_export_is_a_plain_clip_that_comes_back(source, tmp_path):
    config = settings(source, lora_rank=2)
    assert run(config, tmp_path / "run") == 0
    _, params, _ = load_student(tmp_path / "run")
    folder = export_run(None, tmp_path / "run")
    _, again = load_clip(folder, image_size=config.student.image_size)
    jax.tree.map(np.testing.assert_array_equal, leaves(again), leaves(params["student"]))
    torch = pytest.importorskip("torch")
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(folder)
    pixels = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        states = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), output_hidden_states=True).hidden_states
    ours = merge.tokens(vit.from_config(config.student), params, pixels, {}, config)
    np.testing.assert_allclose(ours, states[-1][:, 1:], atol=1e-4)


def test_another_start_features_or_student_than_the_sources_is_refused(source, prepared, tmp_path):
    config = settings(source)

    def refused(message, **sections):
        changed = {name: dataclasses.replace(getattr(config, name), **value) for name, value in sections.items()}
        with pytest.raises(InputError, match=message):
            run(dataclasses.replace(config, **changed), tmp_path)

    refused(r"config.student.width is 16, but the start .* has 32", student={"width": 16})
    refused(
        r"config.student.feature: expected 'layers/-1', as .* was trained, found 'layers/0'",
        student={"feature": "layers/0"},
    )
    refused("config.features.standardize: expected 'none'", features={"standardize": "centred"})
    refused("config.method.source_method.teacher_weighting: expected False", method={"source_method": MoveKDConfig()})
    refused("config.method.source_adapter: expected", method={"source_adapter": AdapterConfig(rank=3)})
    refused("config.method.source: expected the folder", method={"source": ""})
    other = tmp_path / "other"
    start = load_clip(source / "start", image_size=32)[1]
    save_start(config, jax.tree.map(lambda leaf: leaf + 1, start), other)
    refused("is not the start of", student={"initialize": str(other)})


def test_a_merge_is_not_merged_and_an_unfinished_run_only_by_name(source, prepared, tmp_path):
    longer = from_file(CONFIG, overrides(prepared, *SMALL, "--config.train.steps=4"))
    shutil.copytree(source, tmp_path / "unfinished")
    config = dataclasses.replace(longer, train=dataclasses.replace(longer.train, checkpoint_every=1))
    rewrite_settings(tmp_path / "unfinished", config)
    with pytest.raises(InputError, match="is at step 2 of 4"):
        merge_settings(tmp_path / "unfinished")
    named = merge_settings(tmp_path / "unfinished", 2)
    assert named.method.source_step == 2
    assert run(dataclasses.replace(named, train=dataclasses.replace(named.train, steps=1)), tmp_path / "merged") == 0
    with pytest.raises(InputError, match="merged already"):
        merge_settings(tmp_path / "merged")
    with pytest.raises(InputError, match="is at step 2 of 4"):
        run(dataclasses.replace(named, method=dataclasses.replace(named.method, source_step=0)), tmp_path / "again")


def rewrite_settings(folder, config):
    """Puts other settings into a run's newest checkpoint."""
    (path,) = folder.glob("checkpoints/2/meta/metadata")
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "config": to_json(config)}))
