"""The Pix2Struct experts: the image encoder of a reader of screenshots, on a square view as MoVE-KD uses it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.data.view import View
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.experts.published import Published
from tove_jax.hf.rules import Rule
from tove_jax.models.pix2struct import Pix2StructEncoder, patch_grid, render, standardise
from tove_jax.models.resize import resize_corners

SIZE, MAX_PATCHES = 1024, 2048
STRIDE = 32  # of the grid given, not of the patches
_LAYER = "encoder.layer.{layer}."
_MATRIX = (0, 2, 1)


def _linear(name: str, path: str) -> Rule:
    return Rule(f"{_LAYER}{name}.weight", f"layers/{path}/kernel", _MATRIX)


RULES: tuple[Rule, ...] = (
    Rule("embeddings.patch_projection.weight", "patch_embed/kernel", (1, 0)),
    Rule("embeddings.patch_projection.bias", "patch_embed/bias"),
    Rule("embeddings.row_embedder.weight", "row_embed"),
    Rule("embeddings.column_embedder.weight", "column_embed"),
    Rule(f"{_LAYER}pre_attention_layer_norm.weight", "layers/norm1/scale"),
    Rule(f"{_LAYER}pre_mlp_layer_norm.weight", "layers/norm2/scale"),
    _linear("attention.query", "attention/query"),
    _linear("attention.key", "attention/key"),
    _linear("attention.value", "attention/value"),
    _linear("attention.output", "attention/out"),
    _linear("mlp.wi_0", "mlp/gate"),
    _linear("mlp.wi_1", "mlp/fc1"),
    _linear("mlp.wo", "mlp/fc2"),
    Rule("layernorm.weight", "norm/scale"),
)


def encoder_alone(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cuts the prefix ``encoder.`` of a whole model from the names of its image encoder."""
    if not any(name.startswith("encoder.embeddings.") for name in arrays):
        return arrays
    return {name.removeprefix("encoder."): array for name, array in arrays.items()}


def features(module: nn.Module, params: Any, pixels: jax.Array) -> ExpertFeatures:
    """Runs the encoder on a square view.

    As MoVE-KD does: the picture is standardised by its own mean and deviation, resized to the largest
    square of patches within the budget (2048 patches at 1024 px, in proportion to the area at other
    sizes), encoded, and the tokens resized bilinearly to one for every 32 pixels, corners kept.

    Args:
      module: the encoder.
      params: its tree.
      pixels: float (B, S, S, 3), levels 0 to 255; S a multiple of 32.

    Returns:
      Patches (B, S/32, S/32, D); no summary.
    """
    side = pixels.shape[1]
    grid = patch_grid(side, side, MAX_PATCHES * side**2 // SIZE**2)
    tokens, _ = module.apply({"params": params}, render(standardise(pixels), grid))
    resized = resize_corners(tokens.astype(jnp.float32), (side // STRIDE, side // STRIDE))
    return ExpertFeatures(resized.astype(tokens.dtype))


def _row(name: str, size: str, width: int, depth: int, heads: int, mlp_width: int, parameters: int) -> Published:
    module = Pix2StructEncoder(width, depth, heads, mlp_width)
    return Published(
        card=ExpertCard(
            name=name,
            title=f"Pix2Struct-{size} encoder",
            paper="Lee et al., Pix2Struct: Screenshot Parsing as Pretraining for Visual Language Understanding, "
            "ICML 2023, arXiv:2210.03347",
            weights=f"google/pix2struct-{size.lower()}",
            licence="Apache-2.0",
            # Levels as they are: the picture's own mean and deviation follow in `features`.
            view=View(SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), scale=255.0),
            grid=(SIZE // STRIDE, SIZE // STRIDE),
            width=width,
            checked_against="transformers' Pix2StructVisionModel and Pix2StructImageProcessorPil",
            parameters=parameters,
        ),
        build=lambda size: module,
        rules=RULES,
        features=features,
        ignore=(r"decoder\..*",),
        canonical=encoder_alone,
        multiple=STRIDE,
    )


ROWS: tuple[Published, ...] = (
    _row("pix2struct_b", "Base", 768, 12, 12, 2048, 91_835_904),
    _row("pix2struct_l", "Large", 1536, 18, 24, 3968, 512_812_032),
)
