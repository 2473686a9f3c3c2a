"""A MoLA student comes back to the bit, and transformers computes its numbers from the folder alone."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from tove_jax.config.schema import Config, StudentConfig
from tove_jax.errors import InputError
from tove_jax.hf import clip, rules
from tove_jax.hf.export import export_mole_encoder, export_student
from tove_jax.hf.load import import_student
from tove_jax.hf.verify import verify
from tove_jax.models import vit

KINDS = {
    "linears": {},
    "ffn": {"site": "ffn", "alpha": 8.0},
    "dora": {"dora": True, "b_init": "zeros"},
    "no general": {"general_experts": 0, "teacher_experts": 1},
}


@pytest.fixture(params=KINDS)
def student(request, make_student):
    fields = {"teacher_experts": 3, "general_experts": 2, "router_width": 5, **KINDS[request.param]}
    return make_student("mola", **fields)


def test_round_trip_and_the_same_numbers_in_transformers(tmp_path, student, make_params, assert_same):
    params = make_params(student)
    export_student(Config(student=student), params, tmp_path / "a")
    fields, back = import_student(tmp_path / "a")
    assert_same(back, params)
    assert StudentConfig(**fields) == student
    export_student(Config(student=student), back, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    names = {"configuration_mola_clip.py", "modeling_mola_clip.py"}
    assert {name for name in os.listdir(tmp_path / "a") if name.endswith(".py")} == names
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    report = verify(tmp_path / "a", params, pictures=[])
    # Compares every hidden state to 1e-4 and refuses other code than this package's.
    assert report.ok and report.not_run is None, report.lines()
    assert max(report.differences.values()) < 1e-4


def test_shapes_are_the_models(student):
    tree = jax.eval_shape(vit.from_config(student).init, jax.random.key(0), np.zeros((1, 28, 28, 3), np.float32))
    assert {path: leaf.shape for path, leaf in rules.flatten(tree["params"]).items()} == clip.shapes(student)


def test_published_names(make_student, make_params, tmp_path):
    student = make_student("mola", teacher_experts=2, general_experts=1, router_width=5)
    params = make_params(student)
    arrays = rules.to_arrays(params, clip.RULES)
    mine = {
        name.removeprefix("encoder.layers.2.mlp."): a
        for name, a in arrays.items()
        if name.startswith("encoder.layers.2.mlp.")
    }
    expected = {f"fc{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    for group, count in (("teacher", 2), ("general", 1)):
        expected |= {f"router_{group}.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
        expected |= {
            f"mola_{group}_{site}.{e}.lora_{m}.weight" for site in ("down", "up") for e in range(count) for m in "AB"
        }
    assert set(mine) == expected
    down = params["layers"]["mlp"]["adapter"]["teacher_down"]
    np.testing.assert_array_equal(mine["mola_teacher_down.1.lora_A.weight"], down["a_kernel"][2, :, 1].T)
    np.testing.assert_array_equal(mine["mola_teacher_down.1.lora_B.weight"], down["b_kernel"][2, 1].T)
    with pytest.raises(InputError, match="of kind 'mola', so there is no adapter file of MoVE-KD"):
        export_mole_encoder(student, params, tmp_path / "x.safetensors")


def test_folders_that_contradict_themselves(tmp_path, make_student, make_params):
    student = make_student("mola", teacher_experts=2, general_experts=1, router_width=5)
    export_student(Config(student=student), make_params(student), tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for change, message in (
        ({"kind": "mole"}, "but adapter.kind is 'mole'"),
        ({"teacher_experts": 0}, "at least one teacher-specific expert"),
        ({"general_experts": 2}, r"6 missing|missing: .*mola_general_down\.1"),
    ):
        path.write_text(json.dumps({**content, "adapter": {**content["adapter"], **change}}))
        with pytest.raises(InputError, match=message):
            import_student(tmp_path)


def test_remote_model_saves_and_trains(tmp_path, make_student, make_params, assert_same):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    student = make_student("mola", teacher_experts=2, general_experts=1, router_width=5, dora=True, dropout=0.5)
    params = make_params(student)
    export_student(Config(student=student), params, tmp_path / "a")
    model = transformers.AutoModel.from_pretrained(str(tmp_path / "a"), trust_remote_code=True)
    model.save_pretrained(tmp_path / "b")
    fields, back = import_student(tmp_path / "b")
    assert_same(back, params)
    assert dataclasses.replace(fields["adapter"]) == student.adapter
    model.train()
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    model(pixels).last_hidden_state.square().mean().backward()
    experts = model.encoder.layers[0].mlp.mola_teacher_down
    assert any(expert.lora_magnitude.grad.abs().sum() > 0 for expert in experts)
    assert model.eval().bfloat16()(pixels.bfloat16()).last_hidden_state.dtype == torch.bfloat16
