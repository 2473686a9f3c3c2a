"""ViT experts that look everywhere in every layer: CLIP, OpenCLIP, SigLIP, DINOv2, DINOv3, EVA-02-CLIP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from tove_jax.data.view import IMAGENET_MEAN, IMAGENET_STD, View
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.experts.published import Published
from tove_jax.hf import clip
from tove_jax.hf.encoders import clip as encoders_clip
from tove_jax.hf.encoders import dino, eva
from tove_jax.models import rotary
from tove_jax.models.backbone import VisionBackbone

HALF = (0.5, 0.5, 0.5)

# Width, layers, heads, MLP width.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "s": (384, 12, 6, 1536),
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "h": (1280, 32, 16, 5120),
    "so400m": (1152, 27, 16, 4304),
    "openclip_g": (1408, 40, 16, 6144),
    "dinov2_g": (1536, 40, 24, 4096),  # of a gated MLP: two thirds of four times the width
    "giant_opt": (1536, 40, 16, 6144),
    "openclip_bigg": (1664, 48, 16, 8192),
    "dinov3_h_plus": (1280, 32, 20, 5120),
    "dinov3_7b": (4096, 40, 32, 8192),
    "eva02_b": (768, 12, 12, 2048),
    "eva02_l": (1024, 24, 16, 2730),
}


def backbone(kind: str, patch: int, size: int = 0, **options: Any) -> VisionBackbone:
    """Builds a network.

    Args:
      kind: a key of `SIZES`.
      patch: pixels a side.
      size: pixels a side that its learned positions are published for; 0: it has none.
      **options: further fields of `VisionBackbone`.
    """
    width, depth, heads, mlp_width = SIZES[kind]
    grid = (size // patch,) * 2 if size else None
    return VisionBackbone(patch, width, depth, heads, mlp_width, position_grid=grid, **options)


CLIP: dict[str, Any] = {"norm_epsilon": 1e-5, "patch_bias": False, "pre_norm": True}
SIGLIP: dict[str, Any] = {"activation": "gelu_tanh", "class_token": False, "pool": "map"}
DINOV2: dict[str, Any] = {"block": {"layer_scale": True}}
DINOV2_GATED: dict[str, Any] = {"activation": "silu", "block": {"layer_scale": True, "gated": True}}
DINOV3: dict[str, Any] = {"norm_epsilon": 1e-5, "registers": 4, "rotary": rotary.dinov3}
DINOV3_BLOCK: dict[str, Any] = {"layer_scale": True, "biases": ("query", "value", "out")}
EVA02: dict[str, Any] = {
    "activation": "silu",
    "antialias": True,
    "rotary": functools.partial(rotary.eva02, reference=16),
    "block": {"biases": ("query", "value", "out"), "gated": True, "attention_norm": True, "mlp_norm": True},
}


def tokens(module: nn.Module, params: Any, pixels: jax.Array) -> ExpertFeatures:
    """Patch tokens after the final norm, and the network's own pooled vector."""
    return _features(module, params, pixels, "normed")


def inner_tokens(module: nn.Module, params: Any, pixels: jax.Array) -> ExpertFeatures:
    """Patch tokens of the last layer but one, without a norm, and the final norm of CLS.

    CLIP trains its last layer's patch tokens for nothing; LLaVA takes those before it (arXiv:2304.08485).
    """
    return _features(module, params, pixels, "layers/-2")


def _features(module: nn.Module, params: Any, pixels: jax.Array, name: str) -> ExpertFeatures:
    assert isinstance(module, VisionBackbone)
    result: Any = module.apply({"params": params}, pixels, intermediates=(name, "pooled"), final=False)
    found = result[1]
    patches = found[name][:, module.leading :]
    return ExpertFeatures(patches.reshape(-1, *module.grid(pixels), module.width), found["pooled"])


def _row(
    name: str,
    title: str,
    paper: str,
    weights: str,
    licence: str,
    view: View,
    network: VisionBackbone,
    parameters: int,
    checked_against: str,
    features: Callable[..., ExpertFeatures] = tokens,
    **fields: Any,
) -> Published:
    grid = view.size // network.patch_size
    card = ExpertCard(
        name,
        title,
        paper,
        weights,
        licence,
        view,
        (grid, grid),
        network.width,
        network.width,
        checked_against=checked_against,
        parameters=parameters,
    )
    return Published(card, lambda size: network, features=features, multiple=network.patch_size, **fields)


def _clip(name: str, kind: str, patch: int, size: int, weights: str, parameters: int) -> Published:
    return _row(
        f"clip_{name}",
        f"CLIP ViT-{kind.upper()}/{patch}, {size} px (OpenAI)",
        "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, "
        "arXiv:2103.00020",
        weights,
        "MIT",
        View(size),
        backbone(kind, patch, size, activation="quick_gelu", **CLIP),
        parameters,
        "transformers' CLIPVisionModel",
        inner_tokens,
        rules=clip.TOWER_RULES,
        ignore=clip.IGNORE,
        canonical=clip.canonical,
    )


def _openclip(
    name: str, title: str, kind: str, patch: int, weights: str, parameters: int, mean_std: tuple | None = None
) -> Published:
    mean, std = mean_std or (View(224).mean, View(224).std)
    return _row(
        f"openclip_{name}",
        f"OpenCLIP {title} (LAION-2B)",
        "Cherti et al., Reproducible Scaling Laws for Contrastive Language-Image Learning, CVPR 2023, arXiv:2212.07143",
        weights,
        "MIT",
        View(224, mean=mean, std=std),
        backbone(kind, patch, 224, antialias=True, **CLIP),
        parameters,
        "open_clip's VisionTransformer",
        inner_tokens,
        rules=encoders_clip.OPENCLIP_RULES,
        also=(clip.TOWER_RULES,),
        ignore=(*encoders_clip.OPENCLIP_IGNORE, *clip.IGNORE),
        canonical=encoders_clip.canonical,
        file="open_clip_model.safetensors",
    )


_SIGLIP_TITLES = {"b": "B", "l": "L", "so400m": "SO400M", "giant_opt": "g-opt"}
_SIGLIP_HUB = {"b": "base", "l": "large", "so400m": "so400m", "giant_opt": "giant-opt"}


def _siglip(version: int, kind: str, patch: int, size: int, parameters: int) -> Published:
    first = version == 1
    return _row(
        f"siglip{'' if first else version}_{kind}_{patch}_{size}",
        f"SigLIP{'' if first else ' 2'} {_SIGLIP_TITLES[kind]}/{patch}, {size} px",
        "Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023, arXiv:2303.15343"
        if first
        else "Tschannen et al., SigLIP 2, 2025, arXiv:2502.14786",
        f"google/siglip{'' if first else version}-{_SIGLIP_HUB[kind]}-patch{patch}-{size}",
        "Apache-2.0",
        View(size, "squash", "bicubic" if first else "bilinear", HALF, HALF),
        backbone(kind, patch, size, **SIGLIP),
        parameters,
        "transformers' SiglipVisionModel",
        rules=encoders_clip.SIGLIP_RULES,
        ignore=encoders_clip.SIGLIP_IGNORE,
        canonical=clip.canonical,
    )


def _dinov2(name: str, kind: str, parameters: int, registers: int = 0) -> Published:
    gated = kind == "dinov2_g"
    hub = {"s": "small", "b": "base", "l": "large", "dinov2_g": "giant"}[kind]
    return _row(
        f"dinov2_{name}" + ("_reg" if registers else ""),
        f"DINOv2 ViT-{'g' if gated else kind.upper()}/14" + (" with registers" if registers else ""),
        "Darcet et al., Vision Transformers Need Registers, ICLR 2024, arXiv:2309.16588"
        if registers
        else "Oquab et al., DINOv2, TMLR 2024, arXiv:2304.07193",
        f"facebook/dinov2-with-registers-{hub}" if registers else f"facebook/dinov2-{hub}",
        "Apache-2.0",
        View(224, mean=IMAGENET_MEAN, std=IMAGENET_STD, resize=256),
        # transformers resizes positions with a filter in the one class and without in the other.
        backbone(kind, 14, 518, registers=registers, antialias=bool(registers), **(DINOV2_GATED if gated else DINOV2)),
        parameters,
        "transformers' " + ("Dinov2WithRegistersModel" if registers else "Dinov2Model"),
        rules=dino.dinov2_rules(gated=gated),
        ignore=dino.IGNORE,
        canonical=dino.canonical,
    )


def _dinov3(
    name: str, title: str, kind: str, parameters: int, gated: bool = False, biases: tuple[str, ...] | None = None
) -> Published:
    block = {**DINOV3_BLOCK, "gated": gated}
    if biases is not None:
        block["biases"] = biases
    return _row(
        f"dinov3_{name}",
        f"DINOv3 ViT-{title}/16 (LVD-1689M)",
        "Siméoni et al., DINOv3, 2025, arXiv:2508.10104",
        f"facebook/dinov3-vit{name.replace('_', '')}16-pretrain-lvd1689m".replace("plus16", "16plus"),
        "DINOv3 License",
        View(224, "squash", "bilinear", IMAGENET_MEAN, IMAGENET_STD),
        backbone(kind, 16, activation="silu" if gated else "gelu", block=block, **DINOV3),
        parameters,
        "transformers' DINOv3ViTModel",
        rules=dino.DINOV3_RULES,
        ignore=dino.IGNORE,
        canonical=dino.canonical,
    )


def _eva02(name: str, title: str, kind: str, patch: int, size: int, weights: str, parameters: int) -> Published:
    return _row(
        f"eva02_clip_{name}",
        f"EVA-02-CLIP {title}",
        "Sun et al., EVA-CLIP, 2023, arXiv:2303.15389; Fang et al., EVA-02, 2023, arXiv:2303.11331",
        weights,
        "MIT",
        View(size),
        backbone(kind, patch, size, **EVA02),
        parameters,
        "timm's Eva",
        rules=eva.RULES,
        ignore=eva.IGNORE,
        canonical=eva.canonical,
    )


ROWS: tuple[Published, ...] = (
    _clip("b_32", "b", 32, 224, "openai/clip-vit-base-patch32", 87_456_000),
    _clip("b_16", "b", 16, 224, "openai/clip-vit-base-patch16", 85_799_424),
    _clip("l_14", "l", 14, 224, "openai/clip-vit-large-patch14", 303_179_776),
    _clip("l_14_336", "l", 14, 336, "openai/clip-vit-large-patch14-336", 303_507_456),
    _openclip("b_32", "ViT-B/32", "b", 32, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", 87_456_000),
    _openclip("b_16", "ViT-B/16", "b", 16, "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", 85_799_424),
    _openclip("l_14", "ViT-L/14", "l", 14, "laion/CLIP-ViT-L-14-laion2B-s32B-b82K", 303_179_776, (HALF, HALF)),
    _openclip("h_14", "ViT-H/14", "h", 14, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 630_766_080),
    _openclip("g_14", "ViT-g/14", "openclip_g", 14, "laion/CLIP-ViT-g-14-laion2B-s34B-b88K", 1_011_203_840),
    _openclip("bigg_14", "ViT-bigG/14", "openclip_bigg", 14, "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", 1_842_777_344),
    *(
        _siglip(version, kind, patch, size, parameters)
        for version, kind, patch, size, parameters in (
            (1, "b", 16, 224, 92_884_224),
            (1, "b", 16, 256, 92_930_304),
            (1, "b", 16, 384, 93_176_064),
            (1, "b", 16, 512, 93_520_128),
            (1, "l", 16, 256, 315_956_224),
            (1, "l", 16, 384, 316_283_904),
            (1, "so400m", 14, 224, 427_680_704),
            (1, "so400m", 14, 384, 428_225_600),
            (2, "b", 32, 256, 94_552_320),
            (2, "b", 16, 224, 92_884_224),
            (2, "b", 16, 256, 92_930_304),
            (2, "b", 16, 384, 93_176_064),
            (2, "b", 16, 512, 93_520_128),
            (2, "l", 16, 256, 315_956_224),
            (2, "l", 16, 384, 316_283_904),
            (2, "l", 16, 512, 316_742_656),
            (2, "so400m", 14, 224, 427_680_704),
            (2, "so400m", 14, 384, 428_225_600),
            (2, "so400m", 16, 256, 427_888_064),
            (2, "so400m", 16, 384, 428_256_704),
            (2, "so400m", 16, 512, 428_772_800),
            (2, "giant_opt", 16, 256, 1_163_168_256),
            (2, "giant_opt", 16, 384, 1_163_659_776),
        )
    ),
    _dinov2("s", "s", 22_056_192),
    _dinov2("b", "b", 86_579_712),
    _dinov2("l", "l", 304_367_616),
    _dinov2("g", "dinov2_g", 1_136_479_232),
    _dinov2("s", "s", 22_057_728, 4),
    _dinov2("b", "b", 86_582_784, 4),
    _dinov2("l", "l", 304_371_712, 4),
    _dinov2("g", "dinov2_g", 1_136_485_376, 4),
    _dinov3("s", "S", "s", 21_596_160),
    _dinov3("s_plus", "S+", "s", 28_692_480, gated=True),
    _dinov3("b", "B", "b", 85_659_648),
    _dinov3("l", "L", "l", 303_128_576),
    _dinov3("h_plus", "H+", "dinov3_h_plus", 840_591_360, gated=True),
    _dinov3("7b", "7B", "dinov3_7b", 6_716_030_976, gated=True, biases=("out",)),
    _eva02("b", "B/16", "eva02_b", 16, 224, "timm/eva02_base_patch16_clip_224.merged2b", 85_869_312),
    _eva02("l", "L/14", "eva02_l", 14, 224, "timm/eva02_large_patch14_clip_224.merged2b", 303_317_952),
    _eva02("l_336", "L/14, 336 px", "eva02_l", 14, 336, "timm/eva02_large_patch14_clip_336.merged2b", 303_645_632),
)
