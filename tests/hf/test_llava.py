"""LLaVA in and out of folders: every layout and spelling, to the bit; transformers reads and answers; bad input."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.llava_models import GRIDS, LLAVA, NEXT, VISION, described, draw_llava, tree_of, write_llava
from tove_jax.cli.main import main
from tove_jax.config.schema import AdapterConfig, Config
from tove_jax.data.anyres import Anyres
from tove_jax.data.conversation import IMAGE, IMAGE_ID, TEMPLATES, encode, encode_prompt
from tove_jax.data.tokenizer import load_tokenizer, train_tokenizer
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.files.weights import read_arrays
from tove_jax.hf import llava_names, llava_processor
from tove_jax.hf.export import export_student
from tove_jax.hf.llava import load
from tove_jax.hf.llava_config import student_settings
from tove_jax.hf.llava_convert import convert_llava, is_llava
from tove_jax.hf.llava_export import export
from tove_jax.hf.rules import flatten
from tove_jax.hf.verify import VerifyReport
from tove_jax.language.verify import _compare, verify_llava
from tove_jax.models import vit
from tove_jax.models.llava import abstract_params

TEXTS = ["A chat between a curious user and an assistant. USER: What is this? ASSISTANT: a cat", "a dog and a cat"] * 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer", size=290)


def sized(config, rows, image=None):
    """The configuration with another vocabulary and image token."""
    text = {**config["text_config"], "vocab_size": rows}
    return {**config, "text_config": text, "image_token_index": rows - 1 if image is None else image}


def spelling(names):
    """A renaming from `llava_names.TRANSFORMERS`."""

    def rename(name):
        part = next(part for part, begin in llava_names.TRANSFORMERS.items() if name.startswith(begin))
        rest = name.removeprefix(llava_names.TRANSFORMERS[part])
        if names["projector"].endswith("mm_projector."):
            rest = rest.replace("linear_1.", "0.").replace("linear_2.", "2.")
        return names[part] + rest

    return rename


ORIGINAL = spelling(llava_names.ORIGINAL)
SPELLINGS = {
    "4.50": spelling(llava_names.TRANSFORMERS),
    "4.52": spelling({**llava_names.REMOTE, "tower": "model.vision_tower.vision_model."}),
    "5": spelling({**llava_names.TRANSFORMERS, "tower": "vision_tower."}),
    "in memory": spelling(llava_names.REMOTE),
    "original": ORIGINAL,
}


def original_config(config, **fields):
    projector = "linear" if config.get("projector_hidden_act") == "linear" else "mlp2x_gelu"
    return {
        **config["text_config"],
        "model_type": "llava_llama",
        "mm_vision_tower": "tower",
        "mm_hidden_size": 12,
        "mm_projector_type": projector,
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
        **fields,
    }


def write_original(folder, config, weights, tokenizer=None, **fields):
    """The original layout, its tower's configuration beside it."""
    write_llava(folder, original_config(config, **fields), weights, ORIGINAL)
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(json.dumps(config["vision_config"]))
    if tokenizer is not None:
        shutil.copytree(tokenizer.name, folder, dirs_exist_ok=True)
    return folder


def check_tree(params, config, weights):
    expected, found = flatten(tree_of(config, weights)), flatten(params)
    assert sorted(found) == sorted(expected)
    for path, leaf in found.items():
        assert leaf.dtype == expected[path].dtype, path
        assert np.asarray(leaf).tobytes() == expected[path].tobytes(), path


def check_arrays(folder, weights, rename=lambda name: name):
    found = read_arrays(folder)
    assert sorted(found) == sorted(map(rename, weights))
    for name, array in weights.items():
        same = found[rename(name)]
        assert same.dtype == array.dtype and same.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("name", list(SPELLINGS))
def test_every_spelling(name, tmp_path):
    half = {key: array.astype(np.float16) for key, array in draw_llava(LLAVA).items()}
    if name == "original":
        folder = write_original(tmp_path / "in", LLAVA, half)
    else:
        folder = write_llava(tmp_path / "in", LLAVA, half, SPELLINGS[name], shard_bytes=4000)
    model, params, extras = load(folder)
    check_tree(params, LLAVA, half)
    assert dataclasses.replace(extras.described.model) == model == described(LLAVA).model
    assert extras.view == View(8, "pad" if name == "original" else "crop")
    assert extras.image_token == (None if name == "original" else 22)


def processor_files(folder, tokenizer, view):
    shutil.copytree(tokenizer.name, folder, dirs_exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(llava_processor.preprocessor(view)))
    (folder / "processor_config.json").write_text('{"processor_class": "LlavaProcessor", "patch_size": 4}')
    (folder / "chat_template.json").write_text('{"chat_template": "as it was"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5], "transformers_version": "4.37.2"}')


@pytest.mark.parametrize("config", [LLAVA, NEXT], ids=["1.5", "next"])
def test_a_published_folder_goes_out_unchanged(config, tokenizer, tmp_path):
    """Arrays with their names, config.json but for the dtype, and the processor's files."""
    config = {**config, "torch_dtype": "float16", "transformers_version": "4.37.2", "ignore_index": -100}
    weights = {name: array.astype(np.float16) for name, array in draw_llava(config).items()}
    folder = write_llava(tmp_path / "in", config, weights, SPELLINGS["5"])
    tiles = Anyres(View(8, "squash"), 2, tuple(map(tuple, GRIDS)))
    processor_files(folder, tokenizer, tiles if config["model_type"] == "llava_next" else View(8, "squash"))
    model, params, extras = load(folder)
    check_tree(params, config, weights)
    assert extras.ends() == (2, 5) and is_llava(folder)
    assert extras.view == (tiles if model.anyres else View(8, "squash"))
    export(model, params, tmp_path / "out", like=extras, shard_bytes=5000)
    check_arrays(tmp_path / "out", weights, SPELLINGS["5"])
    expected = {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": "float16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_original_layout(tokenizer, tmp_path):
    """In and out unchanged; into transformers' layout with the image token and rows for it."""
    rows = len(tokenizer)
    config = sized(LLAVA, rows)
    weights = draw_llava(config)
    folder = write_original(tmp_path / "in", config, weights, tokenizer)
    model, params, extras = load(folder)
    export(model, params, tmp_path / "back", like=extras, layout="original")
    check_arrays(tmp_path / "back", weights, ORIGINAL)
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    assert told == original_config(config) | {"dtype": "float32"}
    # A config.json made anew describes the same model.
    shutil.copytree(folder / "tower", tmp_path / "made" / "tower")
    export(model, params, tmp_path / "fresh", layout="original", view=extras.view, tokenizer=tokenizer)
    shutil.copytree(tmp_path / "fresh", tmp_path / "made", dirs_exist_ok=True)
    again, same, _ = load(tmp_path / "made", vision=tmp_path / "made" / "tower")
    assert again == model
    check_tree(same, config, weights)

    export(model, params, tmp_path / "out", like=extras)
    found = read_arrays(tmp_path / "out")
    grown = -(-(rows + 1) // 64) * 64
    for name, array in weights.items():
        out = found.pop(name)
        assert out[: len(array)].tobytes() == array.tobytes(), name
        if "embed_tokens" in name or "lm_head" in name:
            assert len(out) == grown
            np.testing.assert_allclose(out[rows:], np.broadcast_to(array.mean(axis=0), out[rows:].shape), atol=1e-6)
    assert not found
    _, _, out = load(tmp_path / "out")
    assert out.image_token == rows and out.view == extras.view == View(8, "pad")
    assert out.tokenizer().inner.convert_tokens_to_ids(IMAGE) == rows and out.ends() == (2,)
    assert len(tokenizer) == rows, "the tokenizer given stays as it is"


def test_parts_from_elsewhere(tokenizer, tmp_path):
    """A first stage's folder: mm_projector alone; tower and language model have folders of their own."""
    config = sized({**LLAVA, "projector_hidden_act": "linear"}, len(tokenizer))
    weights = draw_llava(config)
    folder = write_original(tmp_path / "in", config, {}, mm_vision_tower=str(tmp_path / "clip"))
    (folder / "model.safetensors").unlink()
    from safetensors.numpy import save_file

    projector = {f"model.mm_projector.{n}": weights[f"multi_modal_projector.linear_1.{n}"] for n in ("weight", "bias")}
    save_file(projector, folder / "mm_projector.safetensors")
    tower = {name.removeprefix("vision_tower."): array for name, array in weights.items() if "vision_tower" in name}
    write_llava(tmp_path / "clip", VISION, tower | {"text_model.x": np.zeros(1, np.float32)})
    text = {name.removeprefix("language_model."): a for name, a in weights.items() if name.startswith("language")}
    write_llava(tmp_path / "text", config["text_config"], text)
    with pytest.raises(InputError, match="language model is not among the weights"):
        load(folder)
    model, params, extras = load(folder, language=tmp_path / "text")
    assert model.projector.kind == "linear"
    check_tree(params, config, weights)
    # One linear is two in transformers' layout, the second one the identity; it comes back as one.
    export(model, params, tmp_path / "out", like=extras, tokenizer=tokenizer)
    assert np.array_equal(read_arrays(tmp_path / "out")["multi_modal_projector.linear_2.weight"], np.eye(16))
    again, back, _ = load(tmp_path / "out")
    assert again.projector == model.projector
    assert flatten(back["language"]["projector"]).keys() == flatten(params["language"]["projector"]).keys()


def with_experts(kind):
    """A model whose tower has LoRA experts, random."""
    fields = {"experts": 2} if kind == "mole" else {"teacher_experts": 2, "general_experts": 1, "router_width": 3}
    found = described(sized(LLAVA, 320))
    adapter = AdapterConfig(kind=kind, rank=2, alpha=4.0, **fields)
    student = dataclasses.replace(found.student, adapter=adapter)
    model = dataclasses.replace(found.model, tower=vit.from_config(student))
    random = np.random.RandomState(0)
    params = jax.tree.map(
        lambda leaf: 0.3 * random.standard_normal(leaf.shape).astype(np.float32), abstract_params(model)
    )
    return model, params, student


def test_experts_go_out_and_in(tokenizer, tmp_path):
    """With its own code; and MoVE-KD's layout, whose config.json does not know of them."""
    model, params, student = with_experts("mole")
    export(model, params, tmp_path / "out", student=student, tokenizer=tokenizer)
    found, back, extras = load(tmp_path / "out")
    assert extras.student.adapter == student.adapter
    for path, leaf in flatten(params["student"]).items():
        assert np.asarray(flatten(back["student"])[path]).tobytes() == np.asarray(leaf).tobytes(), path
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mole_llava"
    export(model, params, tmp_path / "released", student=student, tokenizer=tokenizer, layout="original")
    (tmp_path / "released" / "tower").mkdir()
    (tmp_path / "released" / "tower" / "config.json").write_text(json.dumps(VISION))
    assert any(".mlp.original_module.fc1." in name for name in read_arrays(tmp_path / "released"))
    adapter = dataclasses.replace(student.adapter, experts=5, rank=7)  # these are told by the arrays
    _, back, extras = load(tmp_path / "released", vision=tmp_path / "released" / "tower", adapter=adapter)
    assert extras.student.adapter == student.adapter
    assert sorted(flatten(back["student"])) == sorted(flatten(params["student"]))
    with pytest.raises(InputError, match="student="):
        export(model, params, tmp_path / "no", tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["pad", "next", "linear", "mole", "mola"])
def test_transformers_answers_alike(kind, tokenizer, tmp_path):
    """Processor, logits and greedy tokens of exported folders, by `verify_llava`."""
    pytest.importorskip("torch")
    import transformers

    student = None
    config = sized({"next": NEXT, "linear": {**LLAVA, "projector_hidden_act": "linear"}}.get(kind, LLAVA), 290)
    view = (
        Anyres(View(8), 2, tuple(map(tuple, GRIDS))) if kind == "next" else View(8, "pad" if kind == "pad" else "crop")
    )
    if kind in ("mole", "mola"):
        model, params, student = with_experts(kind)
    else:
        model, params = described(config).model, tree_of(config, draw_llava(config))
    export(model, params, tmp_path / "out", view=view, student=student, tokenizer=tokenizer)
    report = verify_llava(tmp_path / "out")
    assert report.ok and report.not_run is None, report.lines()
    assert set(report.differences) == {"logits", "image processor's pixels"} and report.differences["logits"] < 1e-4
    if kind == "pad":
        loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
        processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
        assert type(processor).__name__ == "LlavaProcessor" and processor.tokenizer.padding_side == "left"
        assert loaded.config.image_token_index == 290 and loaded.config.text_config.vocab_size == 320
        prompt = [{"from": "human", "value": f"{IMAGE}\nWhat is this?"}]
        ids = encode_prompt(prompt, TEMPLATES["v1"], load_tokenizer(tmp_path / "out"), images=1)
        assert ids.tolist() == encode_prompt(prompt, TEMPLATES["v1"], tokenizer, images=1).tolist()
    elif kind == "mole":
        code = tmp_path / "out" / "modeling_mole_llava.py"
        code.write_bytes(code.read_bytes() + b"\n")
        report = verify_llava(tmp_path / "out")
        assert not report.ok and "was not run" in report.problems[0]


def test_commands(tokenizer, tmp_path, capsys):
    """Either layout in, the other out, on the command line; options of a CLIP are refused."""
    config = sized(LLAVA, len(tokenizer))
    weights = draw_llava(config)
    folder = write_original(tmp_path / "in", config, weights, tokenizer)
    told = ["import", str(folder), f"--output={tmp_path / 'out'}"]
    assert main(told) == 0
    assert "LLaVA in the original layout" in capsys.readouterr().out and is_llava(tmp_path / "out")
    assert main([*told, "--plain"]) == 2 and "--plain: is for a CLIP" in capsys.readouterr().err
    lines = convert_llava(tmp_path / "out", tmp_path / "back", layout="original", vision=folder / "tower")
    assert lines[0].startswith(f"read     {tmp_path / 'out'}: LLaVA in the transformers layout")
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert not is_llava(folder / "tower") and not is_llava("nowhere/at-all")


def test_verify_sees_differences(tmp_path):
    report = VerifyReport(tmp_path, tmp_path / "model.safetensors")
    logits, mask, tokens = np.zeros((1, 2, 5)), np.ones((1, 2), bool), np.array([[1, 2]])
    _compare(report, logits, tokens, mask, logits + [0, 0, 0, 0, 0.1], tokens)
    _compare(report, logits + [1, 0, 0, 0, 0], tokens, mask, logits + [1, 0, 0, 0, 0], tokens + [[0, 1]])
    _compare(report, logits[:, :1], tokens, mask, logits, tokens)
    assert [problem.split()[0] for problem in report.problems] == ["logits", "greedy", "logits"]


@pytest.mark.parametrize("name", ["v1", "chatml", "llama_2"])
def test_chat_templates_give_our_ids(name, tokenizer):
    """Several turns, pictures, another system prompt: rendered by transformers, the ids are those of training."""
    template = TEMPLATES[name]
    found = llava_processor.add_image_token(tokenizer, template, 320)
    assert found.same and found.image_token == len(tokenizer) and found.rows == 320
    jinja = llava_processor.chat_template(template, found.after_image)
    turns = [("human", f"{IMAGE}\nWhat is this?"), ("gpt", "a cat"), ("human", "and a dog?"), ("gpt", "a dog")]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": "and a dog?"},
        {"role": "assistant", "content": "a dog"},
    ]
    ours = encode([{"from": who, "value": text} for who, text in turns], template, tokenizer, images=1).ids
    wanted = np.where(ours == IMAGE_ID, found.image_token, ours).tolist()
    text = found.inner.apply_chat_template(messages, chat_template=jinja, tokenize=False)
    if name != "llama_2":  # whose turns begin with another <s>
        assert found.inner(text)["input_ids"] == wanted
    told = [{"role": "system", "content": "Be brief."}, *messages[:1]]
    text = found.inner.apply_chat_template(told, chat_template=jinja, tokenize=False, add_generation_prompt=True)
    assert "Be brief." in text and template.system not in text and text.endswith(template.reply)


def test_bad_tokenizers(tokenizer, tmp_path):
    rows = len(tokenizer)
    config = sized(LLAVA, rows)
    weights = draw_llava(config)
    model, params, extras = load(write_llava(tmp_path / "in", config, weights))
    with pytest.raises(InputError, match=f"with <image> as id {rows - 1}, found none"):
        export(model, params, tmp_path / "out", like=extras, tokenizer=tokenizer)
    with pytest.raises(InputError, match="needs a tokenizer"):
        export(model, params, tmp_path / "out")
    few = sized(LLAVA, 40)
    small, drawn = described(few).model, tree_of(few, draw_llava(few))
    with pytest.raises(InputError, match="the vocabulary does not match the weights: token 289 is beyond their 40"):
        export(small, drawn, tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(InputError, match="template 'chatml'.*<|im_start|>"):
        plain = load_tokenizer(without(tokenizer, tmp_path / "plain"))
        export(model, params, tmp_path / "out", tokenizer=plain, template="chatml")
    with pytest.raises(InputError, match="parameters do not fit the model; 1 of another shape: language/model/norm"):
        wrong = {**params["language"]["model"], "norm": {"scale": np.ones(3, np.float32)}}
        export(model, {**params, "language": {**params["language"], "model": wrong}}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.copytree(tokenizer.name, tmp_path / "in", dirs_exist_ok=True)
    with pytest.raises(InputError, match=f"with <image> as id {rows - 1}"):
        verify_llava(tmp_path / "in")


def without(tokenizer, folder):
    """The tokenizer without ChatML's tokens."""
    shutil.copytree(tokenizer.name, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][:3]
    content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if "<|im" not in k}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_onevision"}, "model_type: expected llava, llava_next"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"projector_hidden_act": "linear"}, "expected the identity"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        ({"vision_feature_layer": "last"}, "vision_feature_layer"),
        ({"image_token_index": 23}, "image_token_index 23 is beyond"),
        ({"text_config": {**LLAVA["text_config"], "vocab_size": 24}}, "vocabulary does not match the weights: vocab_size"),
        ({"vision_config": {**VISION, "model_type": "siglip_vision_model"}}, "siglip_vision_model"),
        ({"vision_config": {**VISION, "patch_size": 2}}, "position_embedding.*found"),
        ({"model_type": "llava_next", "image_grid_pinpoints": [[8, 12]]}, "multiples of the tower's 8"),
        ({"model_type": "llava_next", "image_grid_pinpoints": "(1x1)"}, "image_grid_pinpoints"),
        ({"model_type": "llava_next", "image_grid_pinpoints": GRIDS}, "image_newline"),
    ],
)  # fmt: skip
def test_bad_configs(change, message, tmp_path):
    folder = write_llava(tmp_path / "in", {**LLAVA, **change}, draw_llava(LLAVA))
    with pytest.raises(InputError, match=message):
        load(folder)


def test_bad_folders(tmp_path):
    weights = draw_llava(LLAVA)
    sharded = write_llava(tmp_path / "sharded", LLAVA, weights, shard_bytes=4000)
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match="shard .*00002.*is missing"):
        load(sharded)
    strange = write_llava(tmp_path / "strange", LLAVA, {**weights, "language_model.score.weight": np.ones(3)})
    with pytest.raises(InputError, match="1 arrays that no LLaVA has: language_model.score"):
        load(strange)
    twice = {
        **weights,
        "model.vision_tower.pre_layrnorm.weight": weights["vision_tower.vision_model.pre_layrnorm.weight"],
    }
    with pytest.raises(InputError, match="arrays of the tower begin with"):
        load(write_llava(tmp_path / "twice", LLAVA, twice))
    towerless = {name: array for name, array in weights.items() if "vision" not in name}
    with pytest.raises(InputError, match="the vision tower is not among the weights"):
        load(write_llava(tmp_path / "towerless", LLAVA, towerless))
    small = write_llava(tmp_path / "small", LLAVA, weights)
    (small / "preprocessor_config.json").write_text(json.dumps(llava_processor.preprocessor(View(16))))
    with pytest.raises(InputError, match="gives pictures of 16 pixels, the vision tower takes 8"):
        load(small)
    for number, (change, message) in enumerate(
        (
            ({"mm_vision_tower": "nowhere/at-all"}, "mm_vision_tower: nowhere/at-all"),
            ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type"),
            ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
            ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type: expected spatial_unpad"),
            ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature"),
        )
    ):
        with pytest.raises(InputError, match=message):
            load(write_original(tmp_path / f"original{number}", LLAVA, weights, **change))


def test_the_original_next(tmp_path):
    """Its resolutions are width before height."""
    weights = draw_llava(NEXT)
    fields = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[8, 16]]}
    model, params, extras = load(write_original(tmp_path / "in", NEXT, weights, **fields))
    check_tree(params, NEXT, weights)
    assert isinstance(extras.view, Anyres) and extras.view.resolutions == ((16, 8),) and model.anyres


def test_an_encoder_in_your_own_model(tmp_path):
    """The lines of docs/language.md as they stand there: a tower of transformers' LLaVA, and of one's own."""
    torch = pytest.importorskip("torch")
    import transformers

    page = (Path(__file__).parents[2] / "docs" / "language.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page.partition("### An exported encoder in your own model")[2], re.S)
    found = described(LLAVA)
    params = tree_of(LLAVA, draw_llava(LLAVA))["student"]
    folder = tmp_path / "encoder"
    export_student(Config(student=student_settings(found.model, found.student.view)), params, folder)
    fields = {key: value for key, value in LLAVA["text_config"].items() if key != "model_type"}
    names = {"transformers": transformers, "torch": torch, "folder": folder}
    names["text_config"] = transformers.LlamaConfig(**fields)
    for block in blocks:
        exec(block, names)
    pixels = torch.tensor(np.random.RandomState(0).standard_normal((2, 3, 8, 8)), dtype=torch.float32)
    with torch.no_grad():
        own = names["Tower"](folder)(pixels)
        theirs = names["model"].model.get_image_features(pixels).pooler_output
        projected = names["model"].model.multi_modal_projector(own)
    ours = jax.jit(found.model.tower_tokens)({"student": params}, pixels.numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(own, ours, atol=2e-5)
    np.testing.assert_allclose(torch.stack(list(theirs)), projected, atol=2e-5)
