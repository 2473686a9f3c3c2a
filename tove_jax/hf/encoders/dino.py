"""DINOv2, with and without registers, and DINOv3 as transformers publishes them."""

from __future__ import annotations

import numpy as np

from tove_jax.hf.encoders.common import linear, norm, patch_embed
from tove_jax.hf.rules import Rule

_V2 = "encoder.layer.{layer}."
DINOV2_RULES: tuple[Rule, ...] = (
    Rule("embeddings.cls_token", "class_embed", lead=2),
    Rule("embeddings.register_tokens", "registers", lead=1),
    Rule("embeddings.position_embeddings", "position_embed", lead=1),
    *patch_embed("embeddings.patch_embeddings.projection"),
    *norm("layernorm", "post_norm"),
    *norm(f"{_V2}norm1", "layers/norm1"),
    *norm(f"{_V2}norm2", "layers/norm2"),
    Rule(f"{_V2}layer_scale1.lambda1", "layers/scale1"),
    Rule(f"{_V2}layer_scale2.lambda1", "layers/scale2"),
    *linear(f"{_V2}attention.attention.query", "layers/attention/query"),
    *linear(f"{_V2}attention.attention.key", "layers/attention/key"),
    *linear(f"{_V2}attention.attention.value", "layers/attention/value"),
    *linear(f"{_V2}attention.output.dense", "layers/attention/out"),
)
_V2_PLAIN = (*linear(f"{_V2}mlp.fc1", "layers/mlp/fc1"), *linear(f"{_V2}mlp.fc2", "layers/mlp/fc2"))
_V2_GATED = (
    *linear(f"{_V2}mlp.weights_in", "layers/mlp/gate", (0, 2)),
    *linear(f"{_V2}mlp.weights_in", "layers/mlp/fc1", (1, 2)),
    *linear(f"{_V2}mlp.weights_out", "layers/mlp/fc2"),
)

_V3 = "layer.{layer}."
DINOV3_RULES: tuple[Rule, ...] = (
    Rule("embeddings.cls_token", "class_embed", lead=2),
    Rule("embeddings.register_tokens", "registers", lead=1),
    *patch_embed("embeddings.patch_embeddings"),
    *norm("norm", "post_norm"),
    *norm(f"{_V3}norm1", "layers/norm1"),
    *norm(f"{_V3}norm2", "layers/norm2"),
    Rule(f"{_V3}layer_scale1.lambda1", "layers/scale1"),
    Rule(f"{_V3}layer_scale2.lambda1", "layers/scale2"),
    *linear(f"{_V3}attention.q_proj", "layers/attention/query"),
    *linear(f"{_V3}attention.k_proj", "layers/attention/key"),
    *linear(f"{_V3}attention.v_proj", "layers/attention/value"),
    *linear(f"{_V3}attention.o_proj", "layers/attention/out"),
    *linear(f"{_V3}mlp.gate_proj", "layers/mlp/gate"),
    *linear(f"{_V3}mlp.up_proj", "layers/mlp/fc1"),
    *linear(f"{_V3}mlp.down_proj", "layers/mlp/fc2"),
)

# Stands in for masked patches while pre-training; the heads of checkpoints with a classifier.
IGNORE = (r"embeddings\.mask_token", r"classifier\..*")


def dinov2_rules(*, gated: bool) -> tuple[Rule, ...]:
    """Returns the table of DINOv2; `gated` as the giant's MLP is."""
    return (*DINOV2_RULES, *(_V2_GATED if gated else _V2_PLAIN))


def canonical(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes the prefix of a model with a head off."""
    for prefix in ("dinov2.", "dinov2_with_registers.", "dinov3_vit.", "model."):
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays
