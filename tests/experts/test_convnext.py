"""The ConvNeXt experts: published names, views, cards, and loading files in their real format.

Published names and shapes are written by ``python -m tests.experts.test_convnext`` with torch, transformers, timm and
open_clip (MIT; ``pip install --no-deps timm torchvision open_clip_torch ftfy wcwidth``) importable.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from skimage import data as photographs

from tests.encoder_rules import draw_weights, read_names, write_names
from tests.models.test_convnext import DEPTHS, WIDTHS, mend_torchvision
from tove_jax.errors import InputError
from tove_jax.experts import convnext, registry
from tove_jax.hf.rules import flatten, to_arrays, unflatten
from tove_jax.models.convnext import ConvNeXt

NAMES = "convnext_names.json"
ROWS = {row.card.name: row for row in convnext.ROWS}
KEPT = ("convnext_t", "convnext_xxl", "convnextv2_t")


def reference_names(name):
    """Returns names and shapes of the published file's arrays, the text tower of CLIP aside."""
    torch = pytest.importorskip("torch")
    mend_torchvision()
    row = ROWS[name]
    if name == "convnext_xxl":
        pytest.importorskip("timm")
        tower = pytest.importorskip("open_clip.timm_model").TimmModel
        with torch.device("meta"):
            # As in open_clip's convnext_xxlarge.json.
            model = tower("convnext_xxlarge", embed_dim=1024, image_size=256, pool="", proj="linear", pretrained=False)
        return {f"visual.{key}": tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    transformers = pytest.importorskip("transformers")
    kind = "ConvNextV2" if row.build(224).response_norm else "ConvNext"
    labels = 21841 if row.card.weights.endswith("22k") or "-22k-" in row.card.weights else 1000
    network = row.build(224)
    options = {"hidden_sizes": network.widths, "depths": network.depths, "num_labels": labels}
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForImageClassification")(
            getattr(transformers, f"{kind}Config")(**options)
        )
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def check_names(row, published) -> None:
    """Every published name is used or left out on purpose, and every used one has its shape."""
    renamed = row.canonical(dict(published))
    left = {name for name in renamed if any(re.fullmatch(pattern, name) for pattern in row.ignore)}
    assert {name: shape for name, shape in renamed.items() if name not in left} == row.published_shapes()
    assert left  # the classifier, or CLIP's projection


@pytest.mark.parametrize("name", KEPT)
def test_published_names_as_kept(name) -> None:
    check_names(ROWS[name], read_names(NAMES)[name])


@pytest.mark.goldens
@pytest.mark.parametrize("name", ROWS)
def test_published_names_of_the_reference(name) -> None:
    published = reference_names(name)
    check_names(ROWS[name], published)
    if name in KEPT:
        assert read_names(NAMES)[name] == published


def whole(row):
    """Returns the shapes of the published network's features, computed by nobody."""
    module, side = row.build(row.card.view.size), row.card.view.size
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in row.shapes().items()}
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    found = jax.eval_shape(functools.partial(row.features, module), unflatten(params), pixels)
    return found.patches.shape, found.summary and found.summary.shape


def test_cards_are_the_networks() -> None:
    assert len(ROWS) == 14
    for name, row in ROWS.items():
        shapes, card, network = row.shapes(), row.card, row.build(row.card.view.size)
        assert card.parameters == sum(int(np.prod(shape)) for shape in shapes.values()), name
        assert card.width == card.summary_width == network.widths[-1]
        assert card.grid == (card.view.size // 32, card.view.size // 32)
        assert registry.cards()[name] == card
    row = ROWS["convnext_xxl"]
    assert whole(row) == ((1, 32, 32, 3072), (1, 3072))
    card = registry.describe("convnext_xxl:256")
    assert (card.view.size, card.grid, card.parameters) == (256, (8, 8), ROWS["convnext_xxl"].card.parameters)
    card = registry.describe("convnext_t:448")
    assert (card.view.size, card.view.resize, card.grid) == (448, 512, (14, 14))
    with pytest.raises(InputError, match="convnext_t: size: expected a positive multiple of 32, found 100"):
        registry.describe("convnext_t:100")


@pytest.mark.parametrize("photograph", ["coffee", "chelsea"])
def test_views_are_the_image_processors(photograph) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    picture = getattr(photographs, photograph)()
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    for name, processor in (
        # As in the hub repositories' preprocessor_config.json.
        (
            "convnextv2_a",
            transformers.ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875, **imagenet),
        ),
        ("convnext_xxl", transformers.CLIPImageProcessorPil(size={"shortest_edge": 1024}, crop_size=1024)),
    ):
        view = ROWS[name].card.view
        expected = np.asarray(processor(picture, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
        found = view.normalize(view.cut(picture))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_loads_a_classifier(tmp_path) -> None:
    row = ROWS["convnextv2_a"]
    weights = draw_weights(row.published_shapes())
    classifier = {"classifier.weight": np.zeros((1000, 320), np.float32), "classifier.bias": np.zeros(1000, np.float32)}
    save_file(
        {f"convnextv2.{name}": array for name, array in weights.items()} | classifier, tmp_path / "model.safetensors"
    )
    expert = registry.load("convnextv2_a:64", weights=tmp_path)
    back = to_arrays(expert.params, row.rules)
    assert back.keys() == weights.keys() and all(np.array_equal(back[name], weights[name]) for name in weights)
    assert expert.card.weights == "facebook/convnextv2-atto-1k-224" and expert.card.grid == (2, 2)


def test_loads_the_tower_of_open_clip(tmp_path) -> None:
    tiny = ConvNeXt(WIDTHS, DEPTHS, norm_epsilon=1e-5, final_epsilon=1e-5, depthwise="grouped")
    row = dataclasses.replace(ROWS["convnext_xxl"], build=lambda size: tiny)
    weights = draw_weights(row.published_shapes())
    others = ("positional_embedding", "text_projection", "logit_scale", "visual.head.proj.weight", "ln_final.bias",
              "token_embedding.weight", "transformer.resblocks.0.attn.in_proj_weight")  # fmt: skip
    path = tmp_path / "open_clip_model.safetensors"
    arrays = {f"visual.trunk.{name}": array for name, array in weights.items()}
    save_file(arrays | {name: np.ones((2, 2), np.float32) for name in others}, path)
    expert = row.load(weights=path, size=64)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    features = expert.apply(expert.params, pixels)
    assert features.patches.shape == (2, 2, 2, 40) and features.summary.shape == (2, 40)
    last, _ = tiny.apply({"params": expert.params}, row.card.view.normalize(pixels))
    np.testing.assert_array_equal(features.patches, last)
    mean, norm = np.asarray(last).mean((1, 2)), flatten(expert.params)
    mean = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(features.summary, mean * norm["norm/scale"] + norm["norm/bias"], atol=1e-5)

    save_file(arrays | {"visual.trunk.stages.4.gamma": np.ones(2, np.float32)}, path)
    with pytest.raises(InputError, match=r"1 not known: stages.4.gamma \(2,\)"):
        row.load(weights=path)


if __name__ == "__main__":
    write_names(NAMES, {name: reference_names(name) for name in KEPT}, which=-1)
