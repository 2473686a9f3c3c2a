"""The EVA-02 expert: the backbone of EVA-02-L's COCO detector, as MoVE-KD uses it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from tove_jax.data.view import CLIP_MEAN, CLIP_STD, View
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.experts.published import Published
from tove_jax.hf.rules import Rule
from tove_jax.models.eva02_det import Eva02Detection
from tove_jax.models.windowed import GLOBAL, WINDOWED, indices, layer_kinds

PATCH = 16
DEPTH = 24
# Every third layer: the authors' configuration with eight global layers.
GLOBAL_LAYERS = tuple(range(2, DEPTH, 3))
PREFIX = "backbone.net."

# (published, ours, axes) of one layer.
_LAYER: tuple[tuple[str, str, tuple[int, ...] | None], ...] = (
    ("norm1.weight", "norm1/scale", None),
    ("norm1.bias", "norm1/bias", None),
    ("attn.q_proj.weight", "attention/query/kernel", (0, 2, 1)),
    ("attn.q_bias", "attention/query/bias", None),
    ("attn.k_proj.weight", "attention/key/kernel", (0, 2, 1)),
    ("attn.v_proj.weight", "attention/value/kernel", (0, 2, 1)),
    ("attn.v_bias", "attention/value/bias", None),
    ("attn.proj.weight", "attention/out/kernel", (0, 2, 1)),
    ("attn.proj.bias", "attention/out/bias", None),
    ("norm2.weight", "norm2/scale", None),
    ("norm2.bias", "norm2/bias", None),
    ("mlp.w1.weight", "mlp/gate/kernel", (0, 2, 1)),
    ("mlp.w1.bias", "mlp/gate/bias", None),
    ("mlp.w2.weight", "mlp/fc1/kernel", (0, 2, 1)),
    ("mlp.w2.bias", "mlp/fc1/bias", None),
    ("mlp.ffn_ln.weight", "mlp/norm/scale", None),
    ("mlp.ffn_ln.bias", "mlp/norm/bias", None),
    ("mlp.w3.weight", "mlp/fc2/kernel", (0, 2, 1)),
    ("mlp.w3.bias", "mlp/fc2/bias", None),
)
# The detector's other parts, and the rotary tables, which are computed.
IGNORE = (r"(?!backbone\.net\.).*", r"backbone\.net\.(.*\.)?freqs_(cos|sin)")


def rules(depth: int, global_layers: tuple[int, ...]) -> tuple[Rule, ...]:
    """Returns the names in the detector's checkpoint, for `tove_jax.models.eva02_det.Eva02Detection`."""
    kinds = layer_kinds(depth, global_layers)
    return (
        Rule(f"{PREFIX}patch_embed.proj.weight", "patch_embed/kernel", (2, 3, 1, 0)),
        Rule(f"{PREFIX}patch_embed.proj.bias", "patch_embed/bias"),
        Rule(f"{PREFIX}pos_embed", "position_embed", lead=1),
        *(
            Rule(f"{PREFIX}blocks.{{layer}}.{name}", f"layers/{kind}/{path}", axes, layers=indices(kinds, kind))
            for kind in (WINDOWED, GLOBAL)
            for name, path, axes in _LAYER
        ),
    )


def canonical(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gives a backbone that was saved alone the names that it has inside the detector."""
    if any(name.startswith(PREFIX) for name in arrays):
        return arrays
    return {PREFIX + name: array for name, array in arrays.items()}


def build(size: int) -> Eva02Detection:
    """Returns the network; its parameters are the same at every size."""
    return Eva02Detection(
        grid=224 // PATCH,  # of the published position embeddings
        width=1024,
        depth=DEPTH,
        heads=16,
        mlp_width=1024 * 8 // 3,
        global_layers=GLOBAL_LAYERS,
    )


def features(module: nn.Module, params: Any, pixels: jax.Array) -> ExpertFeatures:
    """Returns the last layer's map, (B, S / 16, S / 16, 1024); there is no summary."""
    patches, _ = module.apply({"params": params}, pixels)
    return ExpertFeatures(patches=patches)


ROWS = (
    Published(
        card=ExpertCard(
            name="eva02_l",
            title="EVA-02-L, detection backbone (Objects365, COCO)",
            paper="Fang et al., EVA-02: A Visual Representation for Neon Genesis, arXiv:2303.11331",
            weights="Yuxin-CV/EVA-02",
            licence="MIT",
            # MoVE-KD's; the detector itself was trained with the longer side at 1536 pixels.
            view=View(size=1024, fit="crop", interpolation="bicubic", mean=CLIP_MEAN, std=CLIP_STD),
            grid=(64, 64),
            width=1024,
            checked_against="the authors' PyTorch module (golden numbers)",
            parameters=303_388_608,
        ),
        build=build,
        rules=rules(DEPTH, GLOBAL_LAYERS),
        features=features,
        ignore=IGNORE,
        canonical=canonical,
        multiple=PATCH,
        file="eva02/det/eva02_L_coco_det_sys_o365.pth",
    ),
)
