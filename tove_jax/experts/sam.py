"""The SAM experts: the image encoders of Segment Anything, neck included."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.data.view import IMAGENET_MEAN, IMAGENET_STD, View
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.experts.published import Published
from tove_jax.hf.rules import Rule
from tove_jax.models.sam import SamEncoder
from tove_jax.models.windowed import GLOBAL, WINDOWED, indices, layer_kinds

PATCH = 16
CHANNELS = 256
VIEW = View(size=1024, fit="letterbox", interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)


class Size(NamedTuple):
    """One published size; all have patches of 16 pixels, windows of 14 patches and a neck of 256 channels."""

    name: str
    title: str
    hub: str
    width: int
    depth: int
    heads: int
    global_layers: tuple[int, ...]
    parameters: int


SIZES = (
    Size("sam_b", "SAM ViT-B", "facebook/sam-vit-base", 768, 12, 12, (2, 5, 8, 11), 89_670_912),
    Size("sam_l", "SAM ViT-L", "facebook/sam-vit-large", 1024, 24, 16, (5, 11, 17, 23), 308_278_272),
    Size("sam_h", "SAM ViT-H", "facebook/sam-vit-huge", 1280, 32, 16, (7, 15, 23, 31), 637_026_048),
)

# (published, ours, axes, part) of one layer.
_LAYER: tuple[tuple[str, str, tuple[int, ...] | None, tuple[int, int] | None], ...] = (
    ("layer_norm1.weight", "norm1/scale", None, None),
    ("layer_norm1.bias", "norm1/bias", None, None),
    *(("attn.qkv.weight", f"attention/{p}/kernel", (0, 2, 1), (i, 3)) for i, p in enumerate(("query", "key", "value"))),
    *(("attn.qkv.bias", f"attention/{p}/bias", None, (i, 3)) for i, p in enumerate(("query", "key", "value"))),
    ("attn.rel_pos_h", "attention/position/rows", None, None),
    ("attn.rel_pos_w", "attention/position/columns", None, None),
    ("attn.proj.weight", "attention/out/kernel", (0, 2, 1), None),
    ("attn.proj.bias", "attention/out/bias", None, None),
    ("layer_norm2.weight", "norm2/scale", None, None),
    ("layer_norm2.bias", "norm2/bias", None, None),
    ("mlp.lin1.weight", "mlp/fc1/kernel", (0, 2, 1), None),
    ("mlp.lin1.bias", "mlp/fc1/bias", None, None),
    ("mlp.lin2.weight", "mlp/fc2/kernel", (0, 2, 1), None),
    ("mlp.lin2.bias", "mlp/fc2/bias", None, None),
)
# segment-anything's own names, and what transformers calls them.
_ORIGINAL = (
    (r"image_encoder\.", "vision_encoder."),
    (r"vision_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"vision_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"vision_encoder\.blocks\.", "vision_encoder.layers."),
    (r"vision_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"vision_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"vision_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"vision_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
)
IGNORE = (r"(prompt_encoder|mask_decoder|shared_image_embedding)\..*",)


def rules(depth: int, global_layers: tuple[int, ...]) -> tuple[Rule, ...]:
    """Returns the names in transformers' SamModel and SamVisionModel, for `tove_jax.models.sam.SamEncoder`."""
    kinds = layer_kinds(depth, global_layers)
    return (
        Rule("vision_encoder.patch_embed.projection.weight", "patch_embed/kernel", (2, 3, 1, 0)),
        Rule("vision_encoder.patch_embed.projection.bias", "patch_embed/bias"),
        Rule("vision_encoder.pos_embed", "position_embed", lead=1),
        *(
            Rule(f"vision_encoder.layers.{{layer}}.{name}", f"layers/{kind}/{path}", axes, part, indices(kinds, kind))
            for kind in (WINDOWED, GLOBAL)
            for name, path, axes, part in _LAYER
        ),
        *(Rule(f"vision_encoder.neck.conv{i}.weight", f"neck/conv{i}/kernel", (2, 3, 1, 0)) for i in (1, 2)),
        *(Rule(f"vision_encoder.neck.layer_norm{i}.weight", f"neck/norm{i}/scale") for i in (1, 2)),
        *(Rule(f"vision_encoder.neck.layer_norm{i}.bias", f"neck/norm{i}/bias") for i in (1, 2)),
    )


def canonical(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Brings segment-anything's own names to transformers'; others stay."""

    def rename(name: str) -> str:
        for pattern, replacement in _ORIGINAL:
            name = re.sub("^" + pattern, replacement, name)
        return name

    return {rename(name): array for name, array in arrays.items()}


def zero_padding(pixels: jax.Array, view: View) -> jax.Array:
    """Sets a letterboxed picture's padding to zero, as the reference pads: after normalisation.

    The view pads with the whole number nearest to the mean, so that zero is met to half a level only. The rows at
    the bottom and the columns at the right that have this colour throughout are taken for padding.

    Args:
      pixels: (B, S, S, 3), normalised by `view`.
      view: the letterbox.

    Returns:
      The same shape.
    """
    mean, std = np.asarray(view.mean), np.asarray(view.std)
    colour = (np.floor(mean * 255 / view.scale + 0.5) * view.scale / 255 - mean) / std
    near = 0.25 * view.scale / 255 / std
    padded = jnp.all(jnp.abs(pixels - colour.astype(pixels.dtype)) < near, axis=-1)
    rows = jax.lax.cummin(padded.all(axis=2).astype(jnp.int32), axis=1, reverse=True)
    columns = jax.lax.cummin(padded.all(axis=1).astype(jnp.int32), axis=1, reverse=True)
    outside = (rows[:, :, None] | columns[:, None, :]).astype(bool)
    return jnp.where(outside[..., None], 0, pixels)


def features(module: nn.Module, params: Any, pixels: jax.Array) -> ExpertFeatures:
    """Returns the neck's map, (B, S / 16, S / 16, 256); SAM has no summary."""
    patches, _ = module.apply({"params": params}, zero_padding(pixels, VIEW))
    return ExpertFeatures(patches=patches)


def row(size: Size, pixels: int = VIEW.size) -> Published:
    """Returns the expert of one size.

    Args:
      size: the network.
      pixels: side of the pictures that it was trained for.
    """
    grid = pixels // PATCH

    def build(_: int) -> SamEncoder:
        return SamEncoder(
            grid=grid,
            width=size.width,
            depth=size.depth,
            heads=size.heads,
            mlp_width=4 * size.width,
            global_layers=size.global_layers,
            channels=CHANNELS,
        )

    card = ExpertCard(
        name=size.name,
        title=f"{size.title} (Segment Anything)",
        paper="Kirillov et al., Segment Anything, ICCV 2023, arXiv:2304.02643",
        weights=size.hub,
        licence="Apache-2.0",
        view=dataclasses.replace(VIEW, size=pixels),
        grid=(grid, grid),
        width=CHANNELS,
        checked_against="transformers SamVisionModel",
        parameters=size.parameters,
    )
    return Published(
        card=card,
        build=build,
        rules=rules(size.depth, size.global_layers),
        features=features,
        ignore=IGNORE,
        canonical=canonical,
        multiple=PATCH,
    )


ROWS = tuple(row(size) for size in SIZES)
