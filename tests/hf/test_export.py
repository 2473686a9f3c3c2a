"""Exports load in transformers as they are, come back to the bit, and are written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest

from tove_jax.config.schema import Config, StudentConfig, ViewConfig
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.files.weights import hash_arrays, read_arrays
from tove_jax.hf import clip, export, rules
from tove_jax.hf.export import export_mole_encoder, export_student, hf_preprocessor, save_start
from tove_jax.hf.load import import_student, load_clip


def load_torch(folder, **options):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModel.from_pretrained(
        str(folder), trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("adapter", [{"kind": "none"}, {}, {"site": "ffn", "routing": "dense", "alpha": 8.0}])
def test_round_trip_to_the_bit(tmp_path, make_student, make_params, assert_same, adapter):
    student = make_student(**adapter)
    params = make_params(student)
    export_student(Config(student=student), params, tmp_path / "out")
    fields, back = import_student(tmp_path / "out")
    assert_same(back, params)
    found = StudentConfig(**fields)
    if student.adapter.kind == "none":
        found = dataclasses.replace(found, adapter=student.adapter)
    assert found == student
    export_student(Config(student=student), back, tmp_path / "again")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert ("modeling_mole_clip.py" in os.listdir(tmp_path / "out")) == (student.adapter.kind != "none")


@pytest.mark.parametrize("name", ["top1", "dense"])
def test_transformers_gives_the_authors_numbers(tmp_path, golden, make_student, name):
    torch = pytest.importorskip("torch")
    arrays, config, content = golden(name)
    student = make_student(alpha=config["lora_alpha"], routing="dense" if config["dense"] else "top1")
    params = rules.to_tree(clip.canonical(arrays), clip.RULES, clip.shapes(student))
    export_student(Config(student=student), params, tmp_path)
    model = load_torch(tmp_path, attn_implementation="eager")
    assert not model.training and type(model).__name__ == "MoleCLIPVisionModel"
    with torch.no_grad():
        pixels = torch.from_numpy(content["pixel_values"]).float()
        out = model(pixels, output_hidden_states=True, output_attentions=True)
    for ours, theirs in zip(out.hidden_states, content["hidden_states"], strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)
    np.testing.assert_allclose(out.last_hidden_state.numpy(), content["hidden_states"][-1], atol=1e-5)
    np.testing.assert_allclose(out.pooler_output.numpy(), content["pooled"], atol=1e-5)
    np.testing.assert_allclose(out.attentions[-2].numpy(), content["attention_second_last"], atol=1e-5)
    assert model(pixels).hidden_states is None
    # Names a user of MoVE-KD knows.
    assert "encoder.layers.2.mlp.moe_down.1.lora_A.weight" in model.state_dict()


def test_remote_model_saves_and_trains(tmp_path, make_student, make_params, assert_same):
    torch = pytest.importorskip("torch")
    student = make_student(dropout=0.5)
    params = make_params(student)
    export_student(Config(student=student), params, tmp_path / "a")
    model = load_torch(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert_same(import_student(tmp_path / "b")[1], params)
    model.train()
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)
    model(pixels).last_hidden_state.square().mean().backward()
    assert any(e.lora_A.weight.grad.abs().sum() > 0 for e in model.encoder.layers[0].mlp.moe_down)
    # bfloat16 in, bfloat16 out: the router's float32 softmax must not leak.
    assert model.eval().bfloat16()(pixels.bfloat16()).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize(("fit", "filter_"), [("crop", "bicubic"), ("squash", "bilinear"), ("pad", "bicubic")])
def test_image_processor_gives_the_students_view(tmp_path, make_student, make_params, fit, filter_):
    pytest.importorskip("torch")  # transformers names its processors only beside it
    transformers = pytest.importorskip("transformers")
    view = ViewConfig(fit=fit, interpolation=filter_, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    student = dataclasses.replace(make_student("none"), view=view)
    export_student(Config(student=student), make_params(student), tmp_path)
    fields, _ = import_student(tmp_path)
    assert fields["view"] == view
    processor = transformers.AutoImageProcessor.from_pretrained(str(tmp_path))
    side = 61 if fit == "pad" else 90  # the processor cannot pad, so a square goes in
    picture = np.random.default_rng(0).integers(0, 256, (61, side, 3), dtype=np.uint8)
    from PIL import Image

    found = processor(images=Image.fromarray(picture), return_tensors="np")["pixel_values"][0]
    ours = View(28, fit, filter_, view.mean, view.std)
    np.testing.assert_allclose(found.transpose(1, 2, 0), ours.normalize(ours.cut(picture)), atol=1e-6)


def test_letterbox_is_told(make_student):
    student = dataclasses.replace(make_student("none"), view=ViewConfig(fit="letterbox"))
    assert hf_preprocessor(student)["tove_fit"] == "letterbox"


def test_start_is_a_plain_clip_without_the_experts(tmp_path, make_student, make_params, assert_same):
    student = make_student()
    params = make_params(student)
    save_start(Config(student=student), params, tmp_path)
    fields, start = load_clip(tmp_path)
    assert fields["adapter"].kind == "none"
    del params["layers"]["mlp"]["adapter"]
    assert_same(start, params)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip_vision_model"
    assert type(load_torch(tmp_path)).__name__ == "CLIPVisionModel"


def test_weights_hash_is_recorded(tmp_path, make_student, make_params):
    student = make_student()
    export_student(Config(student=student), make_params(student), tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "np") as file:
        recorded = file.metadata()[export.HASH_KEY]
    assert recorded == hash_arrays(read_arrays(tmp_path))
    assert recorded in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_parameters_that_do_not_fit(tmp_path, make_student, make_params):
    student = make_student()
    params = make_params(student)
    params["class_embed"] = np.zeros(31, np.float32)
    params["head"] = np.zeros(3, np.float32)
    del params["layers"]["mlp"]["adapter"]["up"]
    with pytest.raises(InputError) as caught:
        export_student(Config(student=student), params, tmp_path / "out")
    for part in (
        "class_embed: found (31,), expected (32,)",
        "head: found (3,), expected nothing",
        "adapter/up/a_bias: found nothing, expected (3, 3, 4)",
    ):
        assert part in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_an_earlier_export_is_replaced_and_other_folders_are_not(tmp_path, make_student, make_params):
    student = make_student()
    params = make_params(student)
    export_student(Config(student=student), params, tmp_path / "out")
    export_student(Config(student=make_student("none")), strip(params), tmp_path / "out")
    assert "modeling_mole_clip.py" not in os.listdir(tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"earlier export, found thesis\.tex"):
        export_student(Config(student=student), params, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").exists()


def strip(params):
    leaves = rules.flatten(params)
    return rules.unflatten({path: leaf for path, leaf in leaves.items() if "/adapter/" not in path})


def test_failure_leaves_the_earlier_export(tmp_path, make_student, make_params, monkeypatch):
    student = make_student()
    export_student(Config(student=student), make_params(student), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(export, "model_card", full)
    with pytest.raises(InputError, match="No space left on device"):
        export_student(Config(student=student), make_params(student, 1), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_released_adapter_file_both_ways(tmp_path, golden, make_student, assert_same, suffix):
    if suffix == ".bin":
        pytest.importorskip("torch")
    arrays, _, _ = golden("top1")
    student = make_student()
    params = rules.to_tree(clip.canonical(arrays), clip.RULES, clip.shapes(student))
    path = tmp_path / f"mole_encoder{suffix}"
    export_mole_encoder(student, params, path)
    assert_same(read_arrays(path), arrays)
    with pytest.raises(InputError, match="no LoRA experts"):
        export_mole_encoder(make_student("none"), params, path)
    with pytest.raises(InputError, match=r"ends in \.safetensors or \.bin"):
        export_mole_encoder(student, params, tmp_path / "x.npz")


def test_remote_code_is_shipped_and_imports_nothing_of_ours():
    shipped = [name for names in export.REMOTE_CODE.values() for name in names]
    for name in shipped:
        source = export.remote_code(name).decode()
        assert "tove_jax" not in source
        compile(source, name, "exec")
    folder = pathlib.Path(export.__file__).parent / "remote_code"
    assert sorted(path.name for path in folder.glob("*_*clip.py")) == sorted(shipped)
