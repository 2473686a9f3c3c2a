"""CLIP towers as OpenCLIP publishes them, and SigLIP's, whose names are CLIP's but for the head."""

from __future__ import annotations

import numpy as np

from tove_jax.hf import clip
from tove_jax.hf.encoders.common import fused, linear, norm, patch_embed
from tove_jax.hf.rules import Rule

_LAYER = "visual.transformer.resblocks.{layer}."

OPENCLIP_RULES: tuple[Rule, ...] = (
    Rule("visual.class_embedding", "class_embed"),
    Rule("visual.positional_embedding", "position_embed"),
    *patch_embed("visual.conv1"),
    *norm("visual.ln_pre", "pre_norm"),
    *norm("visual.ln_post", "post_norm"),
    *norm(f"{_LAYER}ln_1", "layers/norm1"),
    *norm(f"{_LAYER}ln_2", "layers/norm2"),
    *fused(f"{_LAYER}attn", "layers/attention"),
    *linear(f"{_LAYER}mlp.c_fc", "layers/mlp/fc1"),
    *linear(f"{_LAYER}mlp.c_proj", "layers/mlp/fc2"),
)

# The text tower and the projections into the common space.
OPENCLIP_IGNORE = (
    r"visual\.proj",
    r"(text\.)?(positional_embedding|text_projection|token_embedding\.weight|ln_final\..*|transformer\..*|attn_mask)",
    r"logit_(scale|bias)",
)

_POOL = "head."
SIGLIP_RULES: tuple[Rule, ...] = (
    *(rule for rule in clip.TOWER_RULES if not rule.path.startswith(("pre_norm", "class_embed"))),
    Rule("embeddings.patch_embedding.bias", "patch_embed/bias"),
    Rule(f"{_POOL}probe", "pool/probe", lead=2),
    *fused(f"{_POOL}attention", "pool"),
    *norm(f"{_POOL}layernorm", "pool/norm"),
    *linear(f"{_POOL}mlp.fc1", "pool/mlp/fc1"),
    *linear(f"{_POOL}mlp.fc2", "pool/mlp/fc2"),
)
SIGLIP_IGNORE = (*clip.IGNORE, r"logit_bias")


def canonical(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes transformers' prefixes off a CLIP or SigLIP tower; OpenCLIP's names stay as they are."""
    if any(name.startswith("visual.") for name in arrays):
        return arrays
    return clip.canonical(arrays)
