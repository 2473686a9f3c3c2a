"""Any CLIP folder that transformers writes is read to the bit, and gives its numbers; bad ones are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tove_jax.config.schema import AdapterConfig, StudentConfig
from tove_jax.errors import InputError
from tove_jax.hf.export import export_student, save_start
from tove_jax.hf.load import import_mole_encoder, import_student, load_clip, locate
from tove_jax.models import vit

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 99}


def scramble(torch, model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def forward(fields, params, pixels):
    student = StudentConfig(**fields)
    names = ("embeddings", *(f"layers/{i}" for i in range(student.layers)), "pooled")
    _, found = jax.jit(lambda p, x: vit.from_config(student).apply({"params": p}, x, intermediates=names))(
        params, pixels
    )
    return [found[name] for name in names]


def torch_forward(torch, model, pixels, **options):
    with torch.no_grad():
        batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        out = model(batch, output_hidden_states=True, **options)
    return [*(state.numpy() for state in out.hidden_states), out.pooler_output.numpy()]


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_vision_model_in_every_container(tmp_path, pixels, assert_same, activation):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = scramble(
        torch, transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION, hidden_act=activation))
    )
    model.save_pretrained(tmp_path / "whole")
    fields, params = load_clip(tmp_path / "whole")
    for ours, theirs in zip(forward(fields, params, pixels), torch_forward(torch, model, pixels), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert fields["activation"] == activation and fields["adapter"].kind == "none"
    assert fields["initialize"] == str(tmp_path / "whole")

    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    state = model.state_dict()
    for folder, prefix, zipped in (("bin", "", True), ("old", "vision_model.", False)):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / "whole" / "config.json", tmp_path / folder)
        named = {prefix + name.removeprefix("vision_model."): value for name, value in state.items()}
        named["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        path = tmp_path / folder / "pytorch_model.bin"
        torch.save(named, path, _use_new_zipfile_serialization=zipped)
    for folder in ("shards", "bin", "old"):
        assert_same(load_clip(tmp_path / folder)[1], params)


def test_clip_model_with_its_text_tower(tmp_path, pixels):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8)
    model = scramble(torch, transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=28, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(tmp_path)
    fields, params = load_clip(tmp_path)
    assert fields["view"].mean == (0.5, 0.5, 0.5) and fields["view"].fit == "crop"
    theirs = torch_forward(torch, model.vision_model, pixels)
    for a, b in zip(forward(fields, params, pixels), theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_half_precision_weights_become_float32(tmp_path, make_student, make_params):
    student = make_student("none")
    save_start(config_of(student), make_params(student), tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    import ml_dtypes

    small = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    save_file(small, tmp_path / "model.safetensors")
    _, params = load_clip(tmp_path)
    assert params["class_embed"].dtype == np.float32
    expected = small["vision_model.embeddings.class_embedding"].astype(np.float32)
    np.testing.assert_array_equal(params["class_embed"], expected)
    arrays["vision_model.embeddings.class_embedding"] = np.arange(32)
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="class_embed has dtype int64"):
        load_clip(tmp_path)


def config_of(student):
    from tove_jax.config.schema import Config

    return Config(title="Test", student=student)


def test_another_image_size(tmp_path, make_student, make_params):
    student = make_student("none")
    save_start(config_of(student), make_params(student), tmp_path)
    fields, params = load_clip(tmp_path, image_size=42)
    assert fields["image_size"] == 42 and params["position_embed"].shape == (37, 32)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPVisionModel.from_pretrained(tmp_path)
    pixels = np.random.default_rng(1).normal(size=(1, 42, 42, 3)).astype(np.float32)
    theirs = torch_forward(torch, model, pixels, interpolate_pos_encoding=True)
    for a, b in zip(forward(fields, params, pixels), theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["top1", "dense"])
def test_released_adapter_file_gives_the_authors_numbers(tmp_path, golden, make_student, make_params, name):
    arrays, config, content = golden(name)
    student = make_student("none")
    save_start(config_of(student), make_params(student), tmp_path / "base")
    save_file(arrays, tmp_path / "mole_encoder.safetensors")
    adapter = AdapterConfig(alpha=config["lora_alpha"], routing="dense" if config["dense"] else "top1")
    fields, params = import_mole_encoder(tmp_path / "mole_encoder.safetensors", tmp_path / "base", adapter=adapter)
    assert (fields["adapter"].experts, fields["adapter"].rank) == (3, 4)
    found = forward(fields, params, content["pixel_values"].transpose(0, 2, 3, 1).astype(np.float32))
    for ours, theirs in zip(found, [*content["hidden_states"], content["pooled"]], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_released_adapter_file_with_experts_alone(tmp_path, golden, make_student, make_params):
    arrays, _, _ = golden("top1")
    student = make_student("none")
    base = make_params(student)
    save_start(config_of(student), base, tmp_path / "base")
    save_file({n: a for n, a in arrays.items() if ".mlp." in n}, tmp_path / "mole_encoder.safetensors")
    _, params = import_mole_encoder(tmp_path / "mole_encoder.safetensors", tmp_path / "base")
    np.testing.assert_array_equal(params["class_embed"], base["class_embed"])
    weight = arrays["encoder.layers.1.mlp.original_module.fc1.weight"]
    np.testing.assert_array_equal(params["layers"]["mlp"]["fc1"]["kernel"][1], weight.T)
    save_file({n: a for n, a in arrays.items() if "moe_up.2" not in n}, tmp_path / "mole_encoder.safetensors")
    with pytest.raises(InputError, match=r"12 missing: encoder\.layers\.0\.mlp\.moe_up\.2\.lora_A\.bias \(4,\)"):
        import_mole_encoder(tmp_path / "mole_encoder.safetensors", tmp_path / "base")
    save_file({n: a for n, a in arrays.items() if "mlp.original" in n}, tmp_path / "mole_encoder.safetensors")
    with pytest.raises(InputError, match="expected LoRA experts"):
        import_mole_encoder(tmp_path / "mole_encoder.safetensors", tmp_path / "base")


def rewrite_weights(folder, change):
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def rewrite_config(folder, **fields):
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


FC1 = "encoder.layers.1.mlp.fc1.weight"
FAULTS = {
    "missing weight": (lambda f: rewrite_weights(f, lambda a: a.pop(FC1)), rf"1 missing: {FC1} \(64, 32\)"),
    "extra weight": (
        lambda f: rewrite_weights(f, lambda a: a.update({"head.weight": np.zeros(3)})),
        r"1 not known: head\.weight \(3,\)",
    ),
    "wrong shape": (
        lambda f: rewrite_weights(f, lambda a: a.update({FC1: a[FC1].T.copy()})),
        rf"{FC1} found \(32, 64\), expected \(64, 32\)",
    ),
    "fewer layers in the config": (lambda f: rewrite_config(f, num_hidden_layers=2), "not known"),
    "more experts in the config": (
        lambda f: rewrite_config(f, adapter={**json.loads((f / "config.json").read_text())["adapter"], "experts": 4}),
        "missing: .*moe_down.3.lora_A.bias",
    ),
    "no experts in the config": (lambda f: rewrite_config(f, adapter=None), "field adapter is missing"),
    "unknown expert field": (lambda f: rewrite_config(f, adapter={"kind": "mole", "expert": 3}), "no such field"),
    "other model": (lambda f: rewrite_config(f, model_type="siglip"), "model_type is 'siglip'"),
    "other activation": (lambda f: rewrite_config(f, hidden_act="relu"), "hidden_act is 'relu'"),
    "ill-typed size": (lambda f: rewrite_config(f, hidden_size="32"), "width: expected int, found str"),
    "negative size": (lambda f: rewrite_config(f, num_hidden_layers=-1), "must be positive"),
    "heads that do not divide": (lambda f: rewrite_config(f, num_attention_heads=5), "32 with 5 heads"),
    "oblong": (lambda f: rewrite_config(f, image_size=[28, 35]), "expected a square"),
    "grey": (lambda f: rewrite_config(f, num_channels=1), "num_channels is 1"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "expected JSON"),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "expected one of model.safetensors"),
    "broken feature": (lambda f: rewrite_config(f, vision_feature_layer=0), "vision_feature_layer is 0"),
    "broken view": (
        lambda f: (f / "preprocessor_config.json").write_text('{"size": 28, "image_mean": "x"}'),
        "image processor",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_folders(tmp_path, make_student, make_params, fault):
    spoil, message = FAULTS[fault]
    student = make_student()
    export_student(config_of(student), make_params(student), tmp_path)
    import_student(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        import_student(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_bin_with_code_is_refused(tmp_path, make_student, make_params):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trace"),)

    student = make_student("none")
    save_start(config_of(student), make_params(student), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Evil()}))
    with pytest.raises(InputError, match="refused"):
        load_clip(tmp_path)
    assert not (tmp_path / "trace").exists()


def test_load_clip_refuses_experts(tmp_path, make_student, make_params):
    student = make_student()
    export_student(config_of(student), make_params(student), tmp_path)
    with pytest.raises(InputError, match="has LoRA experts"):
        load_clip(tmp_path)


def test_locate(tmp_path):
    assert locate(tmp_path) == tmp_path
    with pytest.raises(InputError, match="no such folder, and the hub did not give it"):
        locate("nobody/no-such-model")
    for name in ("/no/such/folder", "./x", "a/b/c", ""):
        with pytest.raises(InputError, match="expected a folder"):
            locate(name if name else tmp_path / "no such")


@pytest.mark.parametrize("pickled", [False, True])
def test_hub_id(tmp_path, make_student, make_params, monkeypatch, pickled):
    hub = pytest.importorskip("huggingface_hub")
    student = make_student("none")
    save_start(config_of(student), make_params(student), tmp_path)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, "pytorch_model*.bin*" in allow_patterns))
        assert not any(pattern.endswith((".py", "*")) and "bin" not in pattern for pattern in allow_patterns)
        if pickled and len(asked) == 1:
            (tmp_path / "model.safetensors").rename(tmp_path / "kept")
        if pickled and len(asked) == 2:
            (tmp_path / "kept").rename(tmp_path / "model.safetensors")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    fields, _ = load_clip("someone/some-clip")
    assert fields["initialize"] == "someone/some-clip" and fields["width"] == 32
    assert asked == [("someone/some-clip", False)] + [("someone/some-clip", True)] * pickled


@pytest.mark.parametrize(("ours", "theirs"), [("layers/-2", -2), ("layers/0", 1), ("layers/2", 3)])
def test_feature_is_counted_as_transformers_does(tmp_path, make_student, make_params, ours, theirs):
    student = dataclasses.replace(make_student("none"), feature=ours)
    export_student(config_of(student), make_params(student), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vision_feature_layer"] == theirs
    assert import_student(tmp_path)[0]["feature"] == ours
