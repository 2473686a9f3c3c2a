"""EVA-02-CLIP as timm publishes it."""

from __future__ import annotations

import numpy as np

from tove_jax.hf.encoders.common import linear, norm, patch_embed
from tove_jax.hf.rules import Rule

_LAYER = "blocks.{layer}."
RULES: tuple[Rule, ...] = (
    Rule("cls_token", "class_embed", lead=2),
    Rule("pos_embed", "position_embed", lead=1),
    *patch_embed("patch_embed.proj"),
    *norm("norm", "post_norm"),
    *norm(f"{_LAYER}norm1", "layers/norm1"),
    *norm(f"{_LAYER}norm2", "layers/norm2"),
    *linear(f"{_LAYER}attn.q_proj", "layers/attention/query"),
    *linear(f"{_LAYER}attn.k_proj", "layers/attention/key"),
    *linear(f"{_LAYER}attn.v_proj", "layers/attention/value"),
    *norm(f"{_LAYER}attn.norm", "layers/attention/norm"),
    *linear(f"{_LAYER}attn.proj", "layers/attention/out"),
    *linear(f"{_LAYER}mlp.fc1_g", "layers/mlp/gate"),
    *linear(f"{_LAYER}mlp.fc1_x", "layers/mlp/fc1"),
    *norm(f"{_LAYER}mlp.norm", "layers/mlp/norm"),
    *linear(f"{_LAYER}mlp.fc2", "layers/mlp/fc2"),
)

# The projection into the space common with text; OpenCLIP's files hold the text tower too.
IGNORE = (r"head\.(weight|bias)", r"text\..*", r"logit_(scale|bias)")


def canonical(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes OpenCLIP's prefix of the picture's tower off."""
    return {name.removeprefix("visual.trunk."): array for name, array in arrays.items()}
