"""Experts outside the table: torch models, ONNX files, Python functions, from spec to training."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tove_jax.config import from_file
from tove_jax.config.specs import ForeignSpec, expert_name, foreign
from tove_jax.data.view import IMAGENET_MEAN, IMAGENET_STD
from tove_jax.errors import InputError
from tove_jax.experts import foreign as room
from tove_jax.experts import registry
from tove_jax.experts.function import expert
from tove_jax.experts.onnx_session import protobuf_field
from tove_jax.experts.run import expert_cards, extract_all, open_stores
from tove_jax.experts.store import FeatureStore

ROOT = Path(__file__).parents[2]
FUNCTIONS = """
from tove_jax.experts.function import expert


@expert(size=16, title="Colours", licence="Apache-2.0")
def colours(pixels):
    return {"patches": pixels[:, ::4, ::4] / 255.0, "summary": pixels.mean((1, 2))}


@expert(size=16)
def tokens(pixels):
    return pixels.reshape(len(pixels), -1, 3)[:, :17]


def bare(pixels):
    return pixels
"""
MODELS = """
import torch

from tove_jax.experts.function import expert


@expert(size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), prefix=1)
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 4, 4), torch.nn.Flatten(2), Transposed(), torch.nn.ZeroPad2d((0, 0, 1, 0)))


class Transposed(torch.nn.Module):
    def forward(self, values):
        return values.transpose(1, 2)


@expert(size=16)
def function():
    return lambda pixels: {"patches": pixels[:, :, ::8, ::8], "summary": pixels.mean((2, 3))}
"""


def _number(number, value):
    key = number << 3
    return bytes([key, value] if key < 128 else [key & 127 | 128, key >> 7, value])


def _value_info(name, shape, kind=1):
    dims = b"".join(
        protobuf_field(1, _number(1, side) if isinstance(side, int) else protobuf_field(2, side.encode()))
        for side in shape
    )
    tensor = _number(1, kind) + protobuf_field(2, dims)
    return protobuf_field(1, name.encode()) + protobuf_field(2, protobuf_field(1, tensor))


def _node(kind, inputs, output, **lists):
    attributes = b"".join(
        protobuf_field(5, protobuf_field(1, name.encode()) + b"".join(_number(8, v) for v in values) + _number(20, 7))
        for name, values in lists.items()
    )
    names = b"".join(protobuf_field(1, name.encode()) for name in inputs)
    return protobuf_field(1, names + protobuf_field(2, output.encode()) + protobuf_field(4, kind.encode()) + attributes)


def onnx_model(kernel, batch="batch", size=16):
    """Returns the bytes of a convolution, stride 4, and the mean of its map."""
    weights = (
        b"".join(_number(1, side) for side in kernel.shape)
        + _number(2, 1)
        + protobuf_field(8, b"kernel")
        + protobuf_field(9, kernel.astype("<f4").tobytes())
    )
    graph = (
        _node("Conv", ["pixels", "kernel"], "map", kernel_shape=[4, 4], strides=[4, 4])
        + _node("Relu", ["map"], "positive")
        + _node("GlobalAveragePool", ["map"], "mean")
        + _node("Flatten", ["mean"], "flat")
        + protobuf_field(2, b"tiny")
        + protobuf_field(5, weights)
        + protobuf_field(11, _value_info("pixels", [batch, 3, size, size]))
        + protobuf_field(12, _value_info("positive", [batch, kernel.shape[0], size // 4, size // 4]))
        + protobuf_field(12, _value_info("flat", [batch, kernel.shape[0]]))
    )
    return _number(1, 8) + protobuf_field(7, graph) + protobuf_field(8, _number(2, 13))


KERNEL = np.random.default_rng(3).normal(size=(6, 3, 4, 4)).astype(np.float32) / 4
PIXELS = np.random.default_rng(4).integers(0, 256, (3, 16, 16, 3), np.uint8)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Makes two modules importable: functions, and torch models."""
    (tmp_path / "own_functions.py").write_text(FUNCTIONS)
    (tmp_path / "own_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("own_functions", "own_models"):
        sys.modules.pop(name, None)


@pytest.fixture
def model_file(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "tiny.onnx"
    path.write_bytes(onnx_model(KERNEL))
    settings = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "outputs": {"patches": "positive", "summary": "flat"}}
    (tmp_path / "tiny.onnx.json").write_text(json.dumps({**settings, "licence": "MIT"}))
    return path


def conv(pixels):
    """Returns the map of the convolution in NumPy: (B, 4, 4, 6)."""
    blocks = pixels.reshape(len(pixels), 4, 4, 4, 4, 3)
    return np.einsum("bhiwjc,dcij->bhwd", blocks, KERNEL)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("torch:facebook/dinov2-small", ForeignSpec("torch-dinov2-small", "torch", "facebook/dinov2-small")),
        ("torch:a/b.c:448", ForeignSpec("torch-b-c", "torch", "a/b.c", 448)),
        ("mine=torch:pkg.mod:make:112", ForeignSpec("mine", "torch", "pkg.mod:make", 112)),
        ("torch:pkg.mod:make", ForeignSpec("torch-mod-make", "torch", "pkg.mod:make")),
        ("onnx:models/edges.v2.onnx", ForeignSpec("onnx-edges-v2", "onnx", "models/edges.v2.onnx")),
        ("onnx:some=where/x:y.onnx", ForeignSpec("onnx-x-y", "onnx", "some=where/x:y.onnx")),
        ("python:pkg.mod:colours", ForeignSpec("python-mod-colours", "python", "pkg.mod:colours")),
        ("hed:112", None),
        ("clip", None),
        ("mine=hed", None),
    ],
)
def test_specs(spec, expected):
    assert foreign(spec) == expected
    assert expert_name(spec) == (expected.name if expected else spec.partition(":")[0])


def test_specs_that_are_refused():
    with pytest.raises(InputError, match="the name 'clip' is a registered expert's"):
        registry.parse("clip=onnx:model.onnx")
    for name in ("", "a b", "..", "é"):
        with pytest.raises(InputError, match="expert name: expected letters, digits"):
            registry.parse(f"{name}=onnx:model.onnx")


def test_function(modules):
    found = registry.load("python:own_functions:colours")
    card = found.card
    assert (card.name, card.weights, card.grid, card.width, card.summary_width, card.backend) == (
        ("python-own_functions-colours", "python:own_functions:colours", (4, 4), 3, 3, "host")
    )
    assert (card.title, card.licence) == ("Colours", "Apache-2.0")
    features = found.apply(found.params, PIXELS)
    np.testing.assert_allclose(features.patches, PIXELS[:, ::4, ::4] / np.float32(255), rtol=1e-6)
    assert features.patches.dtype == np.float32
    assert registry.describe("python:own_functions:colours:32").grid == (8, 8)
    # Another text of the module is another expert.
    with open(modules / "own_functions.py", "a") as file:
        file.write("\n# changed\n")
    assert registry.load("python:own_functions:colours").weights_hash != found.weights_hash


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("python:own_functions:tokens", "expected 0 tokens and a square of patches, found 17 tokens; the setting pre"),
        ("python:own_functions:bare", "nothing tells what pictures it takes"),
        ("python:own_functions:colour", r"has no 'colour' \(did you mean 'colours'\?\)"),
        ("python:own_function:colours", "cannot import 'own_function'.*PYTHONPATH"),
        ("python:own_functions", "expected package.module:callable, found 'own_functions'"),
        ("onnx:none.onnx", "none.onnx: expected an ONNX file, found none"),
    ],
)
def test_functions_that_are_refused(modules, spec, message):
    with pytest.raises(InputError, match=message):
        registry.load(spec)


def test_settings_that_are_refused():
    for settings, message in (
        ({}, "expected the field size"),
        ({"size": 8, "sise": 1}, r"unknown field 'sise' \(did you mean 'size'\?\)"),
        ({"size": "8"}, "size: expected a number of pixels, found '8'"),
        ({"size": 8, "std": (0, 1, 1)}, "view: std: expected three positive numbers"),
        ({"size": 8, "prefix": -1}, "prefix: expected a number of tokens, found -1"),
        ({"size": 8, "outputs": {"patch": "x"}}, "outputs: expected names for patches"),
        ({"size": 8, "title": 3}, "title: expected a text, found 3"),
    ):
        with pytest.raises(InputError, match=message):
            expert(**settings)


def test_onnx_file(model_file):
    found = registry.load(f"onnx:{model_file}")
    view, card = found.card.view, found.card
    assert (view.size, view.mean, card.licence, card.name) == (16, IMAGENET_MEAN, "MIT", "onnx-tiny")
    features = found.apply(found.params, PIXELS)
    wanted = conv(view.normalize(PIXELS))
    np.testing.assert_allclose(features.patches, np.maximum(wanted, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features.summary, wanted.mean((1, 2)), rtol=1e-4, atol=1e-5)
    # Inner tensors, and a file that takes two pictures at a time.
    beside = model_file.with_name("tiny.onnx.json")
    beside.write_text(json.dumps({"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "outputs": {"patches": "map"}}))
    model_file.write_bytes(onnx_model(KERNEL, batch=2))
    inner = registry.load(f"onnx:{model_file}")
    np.testing.assert_allclose(inner.apply({}, PIXELS).patches, wanted, rtol=1e-4, atol=1e-5)
    assert inner.weights_hash != found.weights_hash
    for settings, message in (
        ({"outputs": {"patches": "nap"}}, "with outputs nap: expected an ONNX model"),
        ({}, "outputs: expected the name of the patches among positive, flat, found none"),
        ({"size": 32, "outputs": {"patches": "map"}}, "its input is 16 x 16, but the view's size is 32"),
    ):
        beside.write_text(json.dumps(settings))
        with pytest.raises(InputError, match=message):
            registry.load(f"onnx:{model_file}")
    model_file.write_bytes(onnx_model(KERNEL)[:200])
    with pytest.raises(InputError, match="tiny.onnx: expected an ONNX model"):
        registry.load(f"onnx:{model_file}")


def test_torch_callables(modules):
    torch = pytest.importorskip("torch")
    found = registry.load("net=torch:own_models:network")
    assert (found.card.name, found.card.grid, found.card.width, found.card.view.mean) == ("net", (4, 4), 5, (0.5,) * 3)
    import own_models

    network = own_models.network()
    inputs = torch.from_numpy(found.card.view.normalize(PIXELS).transpose(0, 3, 1, 2).copy())
    wanted = network[0](inputs).permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(found.apply({}, PIXELS).patches, wanted, rtol=1e-5, atol=1e-5)
    half = registry.load("net=torch:own_models:network", dtype="bfloat16")
    np.testing.assert_allclose(half.apply({}, PIXELS).patches, wanted, rtol=0.05, atol=0.05)
    assert half.weights_hash == found.weights_hash
    other = registry.load("torch:own_models:function")
    assert other.card.grid == (2, 2) and other.card.summary_width == 3
    # Other weights are another expert.
    own_models.torch.manual_seed = lambda seed: torch.random.default_generator.manual_seed(seed + 1)
    try:
        assert registry.load("net=torch:own_models:network").weights_hash != found.weights_hash
    finally:
        own_models.torch.manual_seed = torch.random.manual_seed


def _models():
    import transformers as t

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    square = {**small, "image_size": 32, "patch_size": 8}
    clip = t.CLIPConfig(
        vision_config=square, text_config={**small, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
    )
    return {
        "vit": (t.ViTModel, t.ViTConfig(**square), 1, t.ViTImageProcessorPil(size={"height": 32, "width": 32})),
        "dinov2": (
            t.Dinov2WithRegistersModel,
            t.Dinov2WithRegistersConfig(**square, num_register_tokens=3),
            4,
            t.BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
        ),
        "convnext": (
            t.ConvNextModel,
            t.ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], image_size=32),
            0,
            t.ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.8),
        ),
        "clip": (
            t.CLIPModel,
            clip,
            1,
            t.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        ),
    }


@pytest.mark.parametrize("name", ["vit", "dinov2", "convnext", "clip"])
def test_hugging_face_folders(tmp_path, name):
    torch = pytest.importorskip("torch")
    make, config, prefix, processor = _models()[name]
    torch.manual_seed(0)
    whole = make(config).eval()
    whole.save_pretrained(tmp_path / name)
    processor.save_pretrained(tmp_path / name)
    found = registry.load(f"torch:{tmp_path / name}")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8))
    inputs = torch.from_numpy(np.asarray(processor(image)["pixel_values"][0], np.float32)[None])
    pixels = found.card.view.cut(np.asarray(image))[None]
    wanted = getattr(whole, "vision_model", whole)(inputs)
    tokens = wanted.last_hidden_state.detach().numpy()
    tokens = tokens.transpose(0, 2, 3, 1) if tokens.ndim == 4 else tokens[:, prefix:].reshape(1, 4, 4, 16)
    features = found.apply({}, pixels)
    np.testing.assert_allclose(features.patches, tokens, atol=2e-4)
    np.testing.assert_allclose(features.summary, wanted.pooler_output.detach().numpy().reshape(1, -1), atol=2e-4)
    if name != "vit":
        return
    # Without a pooler the summary is CLS; without another weight it is refused.
    path = tmp_path / name
    plain = make(config, add_pooling_layer=False)
    plain.save_pretrained(path)
    assert registry.load(f"torch:{path}").apply({}, pixels).summary.shape == (1, 16)
    from safetensors.numpy import load_file, save_file

    arrays = load_file(path / "model.safetensors")
    save_file({key: value for key, value in arrays.items() if "layernorm.weight" != key}, path / "model.safetensors")
    with pytest.raises(InputError, match="the checkpoint lacks weights of ViTModel.*layernorm.weight"):
        registry.load(f"torch:{path}")


def test_without_torch(modules, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"needs torch, which is not installed; run `pip install tove_jax\[torch\]`"):
        registry.load("torch:own_models:network")


def test_from_spec_to_training(modules, model_file, monkeypatch):
    """One run with an expert of each kind; it trains where the models are gone."""
    from tove_jax.train.loop import train

    kinds = ["python:own_functions:colours", f"own=onnx:{model_file}"]
    try:
        import torch  # noqa: F401

        kinds.append("torch:own_models:network")
    except ImportError:
        pass
    for number in range(12):
        path = modules / "pictures" / f"label{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    config = from_file(
        str(ROOT / "configs/demo.py:smoke"),
        [
            "--config.data.source=folder",
            "--config.data.limit=0",
            f"--config.data.path={modules / 'pictures'}",
            "--config.student.image_size=32",
            "--config.student.adapter.rank=2",
            "--config.method.teacher_prior=()",
            "--config.features.codec=int8,own=pool:2+bf16",
            "--config.train.steps=2",
            "--config.train.batch=8",
            f"--config.features.experts={('clip', *kinds)!r}",
        ],
    )
    workdir = modules / "run"
    names = [expert_name(spec) for spec in kinds]
    stores = extract_all(config, workdir, progress=False)
    assert set(stores) == {"clip", *names} and stores["own"][0] == workdir / "features" / "own"
    own = FeatureStore.open(workdir / "features/own").manifest
    assert own.shapes["patches"] == (2, 2, 6) and own.weights_hash == registry.load(kinds[1]).weights_hash
    # Other weights under the same name are refused.
    model_file.write_bytes(onnx_model(KERNEL * 2))
    with pytest.raises(InputError, match="own: extracted with weights .*, but expert 'own' has weights .* now"):
        extract_all(config, workdir, experts=["own"], progress=False)
    # The features alone are read from here on.
    monkeypatch.setattr(room, "import_callable", None)
    model_file.unlink()
    cards = expert_cards(config, workdir)
    assert cards["own"].grid == (2, 2) and cards[names[0]].width == 3
    assert set(open_stores(config, workdir)) == {"clip", *names}
    assert train(config, workdir, progress=False) == 0
    summary = json.loads((workdir / "metrics.json").read_text())
    assert np.isfinite(summary["train/loss/last"])
    # Another source under the same name is another expert.
    moved = dataclasses.replace(
        config, features=dataclasses.replace(config.features, experts=("clip", *kinds[:1], "own=onnx:other.onnx"))
    )
    with pytest.raises(InputError, match="other.onnx: expected an ONNX file, found none"):
        open_stores(moved, workdir)
