"""The ViT experts' rows: published names and shapes, sizes, views, and loading in the real formats.

``tests/goldens/encoders/vit_names.json`` holds, a row each, how many arrays the reference's published model has and a
hash over their names and shapes. ``python -m tests.experts.test_vit`` writes it from transformers, timm and open_clip.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from skimage import data as photographs

from tests.encoder_rules import ENCODERS
from tests.models import test_backbone as tiny
from tove_jax.errors import InputError
from tove_jax.experts import vit
from tove_jax.experts.published import Published
from tove_jax.hf import clip
from tove_jax.hf.rules import to_arrays, to_tree

NAMES = ENCODERS / "vit_names.json"
ROWS = {row.card.name: row for row in vit.ROWS}
_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
CONFIGS = {
    name: dict(zip(_KEYS, values, strict=True))
    for name, values in {
        "s": (384, 12, 6, 1536), "b": (768, 12, 12, 3072), "l": (1024, 24, 16, 4096), "so400m": (1152, 27, 16, 4304),
        "giant_opt": (1536, 40, 16, 6144), "g": (1536, 40, 24, 6144), "h_plus": (1280, 32, 20, 5120),
        "7b": (4096, 40, 32, 8192),
    }.items()
}  # fmt: skip


def digest(shapes: Mapping[str, tuple[int, ...]]) -> list:
    lines = "\n".join(f"{name} {list(shapes[name])}" for name in sorted(shapes))
    return [len(shapes), hashlib.sha256(lines.encode()).hexdigest()]


def reference_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Returns published names and shapes of the reference, built without memory, but for what the row ignores."""
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        state = _reference(name)
    skip = ROWS[name].ignore
    return {
        key: tuple(value.shape)
        for key, value in state.items()
        if not any(re.fullmatch(pattern, key) for pattern in skip)
    }


def _reference(name: str) -> dict[str, Any]:
    family, *parts = name.split("_")
    if family == "openclip":
        open_clip = pytest.importorskip("open_clip")
        title = {"b_32": "ViT-B-32", "b_16": "ViT-B-16", "l_14": "ViT-L-14", "h_14": "ViT-H-14", "g_14": "ViT-g-14",
                 "bigg_14": "ViT-bigG-14"}["_".join(parts)]  # fmt: skip
        return open_clip.model.CLIP(**open_clip.get_model_config(title)).state_dict()
    if family == "eva02":
        timm = pytest.importorskip("timm")
        title = {"b": "base_patch16_clip_224", "l": "large_patch14_clip_224", "l_336": "large_patch14_clip_336"}
        return timm.create_model(f"eva02_{title['_'.join(parts[1:])]}").state_dict()
    t = pytest.importorskip("transformers")
    from transformers.core_model_loading import revert_weight_conversion

    if family == "clip":
        size = int(parts[2]) if len(parts) == 3 else 224
        config = {**CONFIGS[parts[0]], "patch_size": int(parts[1]), "image_size": size, "hidden_act": "quick_gelu"}
        model = t.CLIPVisionModel(t.CLIPVisionConfig(**config))
    elif family.startswith("siglip"):
        *kind, patch, size = parts
        config = {**CONFIGS["_".join(kind)], "patch_size": int(patch), "image_size": int(size)}
        model = t.SiglipVisionModel(t.SiglipVisionConfig(**config))
    elif family == "dinov2":
        config = {**CONFIGS[parts[0]], "patch_size": 14, "image_size": 518, "use_swiglu_ffn": parts[0] == "g"}
        config.pop("intermediate_size")
        which = "Dinov2WithRegisters" if parts[-1] == "reg" else "Dinov2"
        model = getattr(t, f"{which}Model")(getattr(t, f"{which}Config")(**config))
    else:
        gated = parts[-1] in ("plus", "7b")
        kind = "_".join(parts).replace("s_plus", "s")
        config = {**CONFIGS[kind], "patch_size": 16, "num_register_tokens": 4, "use_gated_mlp": gated}
        if kind == "7b":
            config |= {"query_bias": False, "value_bias": False}
        model = t.DINOv3ViTModel(t.DINOv3ViTConfig(**config))
    return revert_weight_conversion(model, model.state_dict())


@pytest.mark.parametrize("name", ["clip_b_32", "siglip_b_16_224", "dinov2_g_reg", "dinov3_s_plus", "eva02_clip_b"])
def test_published_shapes_are_the_references(name):
    shapes = ROWS[name].published_shapes()
    assert digest(shapes) == json.loads(NAMES.read_text())[name]
    assert reference_shapes(name) == shapes


def test_published_shapes_of_every_row():
    stored = json.loads(NAMES.read_text())
    assert stored.keys() == ROWS.keys()
    for name, row in ROWS.items():
        found = row.published_shapes()
        assert digest(found) == stored[name], name
        assert row.card.parameters == sum(math.prod(shape) for shape in found.values()), name


@pytest.mark.parametrize("name", ["clip_l_14_336", "siglip_so400m_14_384", "siglip2_b_32_256", "dinov2_b", "dinov3_l"])
def test_view(name):
    view, picture = ROWS[name].card.view, photographs.coffee()
    found = view.normalize(view.cut(picture))
    square = {"height": view.size, "width": view.size}
    if name.startswith("dinov3"):
        torch = pytest.importorskip("torch")
        whole = torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)[None]
        cut = torch.nn.functional.interpolate(whole, (view.size, view.size), mode="bilinear", antialias=True)
        expected = (cut[0].permute(1, 2, 0).numpy() - np.float32(view.mean)) / np.float32(view.std)
        # Pillow rounds to whole levels, after each axis.
        assert np.abs(found - expected).max() * min(view.std) <= 1 / 255
        return
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    if name.startswith("clip"):
        processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": view.size}, crop_size=square)
    elif name.startswith("siglip"):
        resample = 3 if name.startswith("siglip_") else 2
        half = [0.5, 0.5, 0.5]
        processor = transformers.SiglipImageProcessorPil(
            size=square, resample=resample, image_mean=half, image_std=half
        )
    else:
        processor = transformers.BitImageProcessorPil(
            size={"shortest_edge": 256},
            crop_size=square,
            resample=3,
            image_mean=list(view.mean),
            image_std=list(view.std),
        )
    expected = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def small(name: str, case: str) -> Published:
    """Returns a row with a tiny network in place of its own."""
    row, module = ROWS[name], tiny.CASES[case].module
    view = dataclasses.replace(row.card.view, size=32, resize=None)
    card = dataclasses.replace(row.card, view=view, grid=(4, 4), width=32, summary_width=32)
    return dataclasses.replace(row, card=card, build=lambda size: module, multiple=8)


def openclip_as_transformers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tree = to_tree(arrays, tiny.CASES["openclip"].rules, tiny.shapes("openclip"))
    return to_arrays(tree, clip.TOWER_RULES)


@pytest.mark.parametrize(
    ("name", "case", "prefix", "strangers"),
    [("siglip_b_16_224", "siglip", "vision_model.", ["text_model.head.weight", "logit_bias"]),
     ("openclip_h_14", "openclip", "", ["visual.proj", "transformer.resblocks.0.ln_1.weight", "logit_scale"]),
     ("openclip_h_14", "openclip", "vision_model.", ["text_projection.weight", "visual_projection.weight"]),
     ("dinov2_g_reg", "dinov2_g_reg", "", ["embeddings.mask_token"]),
     ("eva02_clip_b", "eva02_clip", "visual.trunk.", ["visual.trunk.head.weight", "text.ln_final.weight"])],
)  # fmt: skip
def test_loads_what_is_published(name, case, prefix, strangers, tmp_path):
    row, arrays = small(name, case), tiny.weights(case)
    if case == "openclip" and prefix:
        arrays = openclip_as_transformers(arrays)
    arrays = {prefix + key: array.astype(np.float16) for key, array in arrays.items()}
    file = row.file if row.file and not prefix else "model.safetensors"
    save_file({**arrays, **dict.fromkeys(strangers, np.zeros(2, np.float16))}, tmp_path / file)
    expert = row.load(weights=tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    found = jax.jit(expert.apply)(expert.params, pixels)
    assert found.patches.shape == (2, 4, 4, 32) and found.summary.shape == (2, 32)
    tree = to_tree(tiny.weights(case), tiny.CASES[case].rules, tiny.shapes(case))
    layer = "layers/-2" if case == "openclip" else "normed"
    _, wanted = tiny.CASES[case].module.apply(
        {"params": tree}, row.card.view.normalize(jnp.asarray(pixels)), intermediates=(layer, "pooled"), final=False
    )
    leading = row.build(32).leading
    # Half precision in the file is all that differs.
    np.testing.assert_allclose(found.patches.reshape(2, 16, 32), wanted[layer][:, leading:], atol=2e-2)
    np.testing.assert_allclose(found.summary, wanted["pooled"], atol=2e-2)
    save_file({**arrays, "unknown": np.zeros(2, np.float16)}, tmp_path / file)
    with pytest.raises(InputError, match="1 not known: unknown"):
        row.load(weights=tmp_path)


def test_sizes():
    assert ROWS["dinov2_b"].describe(size=518).grid == (37, 37)
    with pytest.raises(InputError, match="siglip_so400m_14_384: size: expected a positive multiple of 14, found 380"):
        ROWS["siglip_so400m_14_384"].describe(size=380)
    assert ROWS["siglip_so400m_14_384"].describe(size=384).grid == (27, 27)


def write() -> None:
    """Writes the names' hashes."""
    lines = [f'"{name}": {json.dumps(digest(reference_shapes(name)))}' for name in ROWS]
    NAMES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write()
