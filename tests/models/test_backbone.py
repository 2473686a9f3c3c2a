"""The experts' vision transformer on tiny random configurations: equal to transformers, timm and open_clip.

Weights and inputs are drawn by the rule of ``tests/encoder_rules.py`` from the published names, so that the goldens
(``tests/goldens/encoders/vit_tiny.npz``) hold outputs alone. ``python -m tests.models.test_backbone`` writes them; it
needs torch and transformers, and timm and open_clip importable (``--no-deps``).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.encoder_rules import ENCODERS, draw_input, draw_weights
from tove_jax.errors import InputError
from tove_jax.experts import vit
from tove_jax.hf import clip
from tove_jax.hf.encoders import clip as encoders_clip
from tove_jax.hf.encoders import dino, eva
from tove_jax.hf.rules import Rule, flatten, to_arrays, to_tree
from tove_jax.models import rotary
from tove_jax.models.backbone import LOGICAL_AXES, VisionBackbone
from tove_jax.parallel import logical_specs

GOLDEN = ENCODERS / "vit_tiny.npz"
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
BASE = (8, 32, 3, 4, 48)  # patch, width, depth, heads, MLP width
SIZES = ((32, 32), (40, 24))


class Case(NamedTuple):
    """One tiny network: ours, its table, and a function that builds the reference."""

    module: VisionBackbone
    rules: tuple[Rule, ...]
    reference: Callable[[], Any]
    sizes: tuple[tuple[int, int], ...] = SIZES


def transformers_model(name: str, config: str, **fields: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    fields = {**SMALL, "patch_size": 8, "image_size": 32, **fields}
    return getattr(transformers, name)(getattr(transformers, config)(**fields, attn_implementation="eager"))


def timm_model(**fields: Any) -> Any:
    pytest.importorskip("timm")
    from timm.models.eva import Eva

    return Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, mlp_ratio=1.5, qkv_fused=False, swiglu_mlp=True,
        scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True, ref_feat_shape=(6, 6), num_classes=0,
        dynamic_img_size=True, global_pool="token", **fields,
    )  # fmt: skip


def open_clip_model() -> Any:
    open_clip = pytest.importorskip("open_clip")
    torch = pytest.importorskip("torch")

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = open_clip.transformer.VisionTransformer(32, 8, 32, 3, 4, 1.5, output_dim=16)

    return Tower()


CASES: dict[str, Case] = {
    "clip": Case(
        VisionBackbone(*BASE, activation="quick_gelu", position_grid=(4, 4), **vit.CLIP),
        clip.TOWER_RULES,
        functools.partial(transformers_model, "CLIPVisionModel", "CLIPVisionConfig"),
    ),
    "openclip": Case(
        VisionBackbone(*BASE, position_grid=(4, 4), **vit.CLIP),
        encoders_clip.OPENCLIP_RULES,
        open_clip_model,
        SIZES[:1],
    ),
    "siglip": Case(
        VisionBackbone(*BASE, position_grid=(4, 4), **vit.SIGLIP),
        encoders_clip.SIGLIP_RULES,
        functools.partial(transformers_model, "SiglipVisionModel", "SiglipVisionConfig"),
    ),
    "dinov2": Case(
        VisionBackbone(*BASE[:4], 64, position_grid=(4, 4), **vit.DINOV2),
        dino.dinov2_rules(gated=False),
        functools.partial(transformers_model, "Dinov2Model", "Dinov2Config", mlp_ratio=2),
    ),
    "dinov2_g_reg": Case(
        VisionBackbone(*BASE[:4], 88, position_grid=(4, 4), registers=4, antialias=True, **vit.DINOV2_GATED),
        dino.dinov2_rules(gated=True),
        functools.partial(
            transformers_model, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=4, use_swiglu_ffn=True
        ),
    ),
    "dinov3": Case(
        VisionBackbone(*BASE, block={**vit.DINOV3_BLOCK}, **vit.DINOV3),
        dino.DINOV3_RULES,
        functools.partial(
            transformers_model, "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4, layerscale_value=0.5
        ),
    ),
    "dinov3_7b": Case(
        VisionBackbone(
            *BASE, activation="silu", block={**vit.DINOV3_BLOCK, "gated": True, "biases": ("out",)}, **vit.DINOV3
        ),
        dino.DINOV3_RULES,
        functools.partial(
            transformers_model, "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4, use_gated_mlp=True,
            hidden_act="silu", query_bias=False, value_bias=False,
        ),
    ),
    "eva02_clip": Case(
        VisionBackbone(
            *BASE, position_grid=(4, 4), **{**vit.EVA02, "rotary": functools.partial(rotary.eva02, reference=6)}
        ),
        eva.RULES,
        timm_model,
    ),
}  # fmt: skip


@functools.cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    module = CASES[name].module
    tree = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


@functools.cache
def weights(name: str) -> dict[str, np.ndarray]:
    """Draws the published arrays; patches are embedded with weights large enough to matter beside the positions."""
    by_path = {rule.path: rule for rule in CASES[name].rules}
    published = {
        key: by_path[path].published_shape(shape)
        for path, shape in shapes(name).items()
        for key in by_path[path].names(shape)
    }
    return draw_weights(published)


def outputs(name: str, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Runs ours: what every layer gives, the final norm, the pooled vector, and a row of attention."""
    case = CASES[name]
    params = to_tree(weights(name), case.rules, shapes(name))
    pixels = jnp.asarray(draw_input(1, (2, 3, *size))).transpose(0, 2, 3, 1)
    names = ["embeddings", "layers/0", "layers/-1", "normed", "pooled"]
    if case.module.class_token:
        names.append("layers/1/attention_cls")
    run = jax.jit(lambda p, x: case.module.apply({"params": p}, x, intermediates=tuple(names), final=False)[1])
    return {key: np.asarray(value) for key, value in run(params, pixels).items()}


def reference(name: str, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Runs the reference with the same weights and input."""
    torch = pytest.importorskip("torch")
    case = CASES[name]
    model = case.reference().eval()
    arrays = {key: torch.from_numpy(array) for key, array in weights(name).items()}
    pixels = torch.from_numpy(draw_input(1, (2, 3, *size)))
    with torch.no_grad():
        if name in ("eva02_clip", "openclip"):
            missing, extra = model.load_state_dict(arrays, strict=False)
            assert not extra and set(missing) <= {"visual.proj"}, (missing, extra)
            if name == "openclip":
                found, tokens = {}, None
                hooks = {"embeddings": model.visual.ln_pre, "layers/0": model.visual.transformer.resblocks[0],
                         "layers/-1": model.visual.transformer.resblocks[-1]}  # fmt: skip
                for key, module in hooks.items():
                    module.register_forward_hook(lambda m, i, o, key=key: found.__setitem__(key, o))
                model.visual.proj.data = torch.eye(32)
                found["pooled"] = model.visual(pixels)
                return {key: value.numpy() for key, value in found.items()}
            tokens, layers = model.forward_intermediates(
                pixels, norm=False, output_fmt="NLC", return_prefix_tokens=True
            )
            layers = [torch.cat([prefix, patches], 1) for patches, prefix in layers]
            found = {"layers/0": layers[0], "layers/-1": layers[-1], "normed": tokens}
            return {**{key: value.numpy() for key, value in found.items()}, "pooled": model(pixels).numpy()}
        model = reload(model, weights(name))
        more = {} if name.startswith("dino") else {"interpolate_pos_encoding": True}
        result = model(pixels, output_hidden_states=True, output_attentions=True, **more)
    hidden = [value.numpy() for value in result.hidden_states]
    last = result.last_hidden_state.numpy()
    found = {"embeddings": hidden[0], "layers/0": hidden[1], "pooled": result.pooler_output.numpy()}
    found["layers/-1" if name == "clip" else "normed"] = last
    if CASES[name].module.class_token:
        found["layers/1/attention_cls"] = result.attentions[1][:, :, 0].numpy()
    return found


def reload(model: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Lets transformers itself read the arrays under their published names."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        save_file(arrays, f"{folder}/model.safetensors", metadata={"format": "pt"})
        model, told = type(model).from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not told["unexpected_keys"] and not told["mismatched_keys"]
    assert set(told["missing_keys"]) <= {"embeddings.mask_token"}
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    with np.load(GOLDEN) as golden:
        for size in CASES[name].sizes:
            found = outputs(name, size)
            prefix = f"{name}/{size[0]}x{size[1]}/"
            keys = [key for key in golden.files if key.startswith(prefix)]
            assert {"layers/-1", "pooled"} & {key.removeprefix(prefix) for key in keys}
            for key in keys:
                np.testing.assert_allclose(found[key.removeprefix(prefix)], golden[key], atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    for size in CASES[name].sizes:
        found, expected = outputs(name, size), reference(name, size)
        assert len(expected) >= 4
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, atol=2e-5, err_msg=f"{size} {key}")


@pytest.mark.parametrize("name", CASES)
def test_names_go_both_ways_and_axes_cover(name):
    case = CASES[name]
    tree = to_tree(weights(name), case.rules, shapes(name))
    back = to_arrays(tree, case.rules)
    assert back.keys() == weights(name).keys()
    for key, array in back.items():
        np.testing.assert_array_equal(array, weights(name)[key])
    logical_specs({"expert": tree}, LOGICAL_AXES, "axes")


def test_what_is_not_asked_for_is_not_run():
    module = CASES["siglip"].module
    params = to_tree(weights("siglip"), CASES["siglip"].rules, shapes("siglip"))
    pixels = jnp.zeros((1, 32, 32, 3))
    poisoned = {**params, "layers": jax.tree.map(lambda leaf: jnp.asarray(leaf).at[2:].set(jnp.nan), params["layers"])}
    none, found = module.apply({"params": poisoned}, pixels, intermediates=("layers/1",), final=False)
    assert none is None and np.isfinite(found["layers/1"]).all()
    without_pool = {key: value for key, value in params.items() if key != "pool"}
    tokens, found = module.apply({"params": without_pool}, pixels, intermediates=("layers/-1", "normed"))
    np.testing.assert_array_equal(tokens, found["layers/-1"])


def test_wrong_requests_are_refused():
    module = CASES["siglip"].module
    params = to_tree(weights("siglip"), CASES["siglip"].rules, shapes("siglip"))

    def run(size, *names):
        module.apply({"params": params}, jnp.zeros((1, *size, 3)), intermediates=names)

    with pytest.raises(InputError, match="the encoder has no class token"):
        run((32, 32), "layers/0/attention_cls")
    with pytest.raises(InputError, match="intermediate 'poled': expected embeddings, normed, pooled"):
        run((32, 32), "poled")
    with pytest.raises(InputError, match=r"of at least 8 x 8, found \(1, 7, 32, 3\)"):
        run((7, 32))


def test_bfloat16():
    case = CASES["dinov3"]
    params = to_tree(weights("dinov3"), case.rules, shapes("dinov3"))
    pixels = jnp.asarray(draw_input(1, (2, 3, 32, 32))).transpose(0, 2, 3, 1)
    tokens, found = case.module.clone(dtype=jnp.bfloat16).apply(
        {"params": params}, pixels, intermediates=("normed", "layers/0/attention_cls")
    )
    assert tokens.dtype == found["normed"].dtype == jnp.bfloat16
    assert found["layers/0/attention_cls"].dtype == jnp.float32
    assert np.abs(found["normed"].astype(np.float32) - outputs("dinov3", (32, 32))["normed"]).max() < 0.1


@pytest.mark.goldens
@pytest.mark.parametrize("name", CASES)
def test_goldens_are_the_references(name):
    with np.load(GOLDEN) as golden:
        for size in CASES[name].sizes:
            for key, value in reference(name, size).items():
                stored = f"{name}/{size[0]}x{size[1]}/{key}"
                if stored in golden:
                    np.testing.assert_allclose(golden[stored], value, atol=1e-5)


def write() -> None:
    """Writes the goldens."""
    arrays = {}
    for name, case in CASES.items():
        for size in case.sizes:
            for key, value in reference(name, size).items():
                if key not in ("layers/0", "embeddings") or size == SIZES[1]:
                    arrays[f"{name}/{size[0]}x{size[1]}/{key}"] = value.astype(np.float32)
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    write()
