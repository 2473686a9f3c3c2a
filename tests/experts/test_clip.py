"""The `clip` expert against transformers' CLIPVisionModel.

The golden is made by ``python tests/experts/test_clip.py`` with torch and transformers importable;
its weights come from the rule of ``tests/goldens/clip_vision.py``.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tove_jax.config.schema import StudentConfig
from tove_jax.errors import InputError
from tove_jax.experts import registry

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN = GOLDENS / "experts" / "clip.npz"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def rule():
    """Returns the module with the rule of the weights, and its case."""
    spec = importlib.util.spec_from_file_location("clip_vision_rule", GOLDENS / "clip_vision.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.CASES["tiny_quick_gelu"]


def write_folder(folder: Path) -> Path:
    """Writes the golden's weights as a Hugging Face folder."""
    module, case = rule()
    folder.mkdir(exist_ok=True)
    save_file(module.weights(case), folder / "model.safetensors")
    config = {
        "model_type": "clip_vision_model", "hidden_size": case["width"], "intermediate_size": case["mlp_width"],
        "num_hidden_layers": case["layers"], "num_attention_heads": case["heads"],
        "image_size": case["image_size"], "patch_size": case["patch_size"], "hidden_act": case["act"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    size = case["image_size"]
    preprocessor = {
        "size": {"shortest_edge": size + 4}, "crop_size": {"height": size, "width": size}, "resample": 2,
        "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)


def reference(folder: Path) -> dict[str, np.ndarray]:
    """Returns transformers' ``hidden_states[-2]`` and CLS's row of ``attentions[-2]`` before the mean over heads."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPVisionModel.from_pretrained(folder, attn_implementation="eager").eval().double()
    images = torch.tensor(((pictures() / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2))
    with torch.no_grad():
        result = model(images, output_hidden_states=True, output_attentions=True)
    found = {"hidden": result.hidden_states[-2], "attention": result.attentions[-2][:, :, 0]}
    return {name: value.float().numpy() for name, value in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.goldens
def test_golden_is_the_reference(golden, folder) -> None:
    for name, values in reference(folder).items():
        np.testing.assert_allclose(golden[name], values, atol=1e-6)


def test_equals_the_golden(golden, folder) -> None:
    expert = registry.load("clip", weights=folder)
    features = jax.jit(expert.apply)(expert.params, pictures())
    assert features.patches.shape == (2, 4, 4, 24)
    np.testing.assert_allclose(features.patches.reshape(2, 16, 24), golden["hidden"][:, 1:], atol=1e-5)
    np.testing.assert_allclose(features.summary, golden["hidden"][:, 0], atol=1e-5)
    attention = golden["attention"]
    assert attention[..., 1:].std() > 0.01
    np.testing.assert_allclose(features.cls_attention, attention.mean(1)[:, 1:], atol=1e-6)
    np.testing.assert_allclose(features.cls_scores, np.log(attention).mean(1)[:, 1:], atol=1e-5)


def test_card_is_the_folders(folder) -> None:
    expert = registry.load("clip", weights=folder)
    card = expert.card
    assert card == registry.describe("clip", weights=str(folder))
    assert (card.grid, card.width, card.summary_width, card.has_cls_attention) == ((4, 4), 24, 24, True)
    view = card.view
    assert (view.size, view.resize, view.interpolation, view.mean, view.std) == (
        28,
        32,
        "bilinear",
        MEAN,
        STD,
    )
    assert card.parameters == sum(leaf.size for leaf in jax.tree.leaves(expert.params))
    assert len(expert.weights_hash) == len(registry.load("hed", size=64).weights_hash)


def test_another_layer_and_size(folder) -> None:
    expert = registry.load("clip:42", weights=folder, feature="layers/0")
    assert expert.card == registry.describe("clip:42", weights=folder, feature="layers/0")
    assert (expert.card.view.size, expert.card.view.resize, expert.card.grid) == (42, 48, (6, 6))
    features = jax.eval_shape(expert.apply, expert.params, np.zeros((2, 42, 42, 3), np.uint8))
    assert features.patches.shape == (2, 6, 6, 24) and features.cls_attention.shape == (2, 36)


def test_feature_follows_the_folder(folder, tmp_path, golden) -> None:
    other = write_folder(tmp_path / "other")
    path = other / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vision_feature_layer": -1}))
    (other / "preprocessor_config.json").unlink()
    expert = registry.load("clip", weights=other)
    assert expert.card.view.mean == StudentConfig().view.mean and expert.card.view.size == 28
    last = expert.apply(expert.params, pictures())
    assert np.abs(last.summary - golden["hidden"][:, 0]).max() > 0.1
    assert expert.weights_hash == registry.load("clip", weights=folder).weights_hash


def test_bad_input(folder, tmp_path) -> None:
    with pytest.raises(InputError, match="clip: weights: expected the CLIP folder"):
        registry.load("clip")
    with pytest.raises(InputError, match="clip: weights: expected the CLIP folder"):
        registry.describe("clip")
    with pytest.raises(InputError, match="config.json"):
        registry.load("clip", weights=tmp_path)
    for feature in ("layers/3", "layers/-4", "pooled"):
        with pytest.raises(InputError, match=r"feature: expected layers/<i> of an encoder of 3 layers"):
            registry.load("clip", weights=folder, feature=feature)
    for size in (0, 6):
        with pytest.raises(InputError, match="size: expected at least one patch of 7 pixels"):
            registry.load("clip", weights=folder, size=size)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        np.savez_compressed(GOLDEN, **reference(write_folder(Path(made) / "tiny")))
