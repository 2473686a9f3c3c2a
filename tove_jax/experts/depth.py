"""Experts that give depth: DPT and Depth Anything, run in JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from tove_jax.data.view import IMAGENET_MEAN, IMAGENET_STD, View
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.experts.published import Published
from tove_jax.hf.encoders import dino
from tove_jax.hf.encoders.common import linear, norm, patch_embed
from tove_jax.hf.rules import Rule
from tove_jax.models.dpt import FACTORS, DepthNetwork
from tove_jax.models.relative_position import linear_matrix

_LAYER = "encoder.layer.{layer}."
_KERNEL = (2, 3, 1, 0)


def _convolution(theirs: str, ours: str, bias: bool = True) -> tuple[Rule, ...]:
    rules = (Rule(f"{theirs}.weight", f"{ours}/kernel", _KERNEL), Rule(f"{theirs}.bias", f"{ours}/bias"))
    return rules if bias else rules[:1]


def _decoder() -> tuple[Rule, ...]:
    """Returns the rules of the neck; readouts and head differ."""
    rules: list[Rule] = []
    for index, factor in enumerate(FACTORS):
        stage, ours = f"neck.reassemble_stage.layers.{index}", f"enlarge{index}"
        rules += _convolution(f"{stage}.projection", f"project{index}")
        if factor > 1:
            rules += [Rule(f"{stage}.resize.weight", f"{ours}/kernel", (0, 2, 3, 1))]
            rules += [Rule(f"{stage}.resize.bias", f"{ours}/bias")]
        elif factor < 1:
            rules += _convolution(f"{stage}.resize", f"reduce{index}")
        rules += _convolution(f"neck.convs.{index}", f"neck{index}", bias=False)
        fusion = f"neck.fusion_stage.layers.{index}"
        rules += _convolution(f"{fusion}.projection", f"fusion{index}_project")
        for unit, part in ((1, "inner"), (2, "outer")):
            for number in (1, 2):
                name = f"{fusion}.residual_layer{unit}.convolution{number}"
                rules += _convolution(name, f"fusion{index}_{part}{number}")
    return tuple(rules)


# The first fusion has nothing to add, yet the published networks hold the weights for it.
IGNORE = (r"neck\.fusion_stage\.layers\.0\.residual_layer1\..*",)
DPT_IGNORE = (*IGNORE, r"dpt\.pooler\..*", r"auxiliary_head\..*")
ANYTHING_IGNORE = (*IGNORE, *(rf"backbone\.{pattern}" for pattern in dino.IGNORE))


def _trunk_rules(prefix: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Returns the rules of a transformer inside the network."""
    return tuple(
        dataclasses.replace(rule, name=f"{prefix}.{rule.name}", path=f"backbone/{rule.path}") for rule in rules
    )


_VIT_RULES = (
    Rule("embeddings.cls_token", "class_embed", lead=2),
    Rule("embeddings.position_embeddings", "position_embed", lead=1),
    *patch_embed("embeddings.patch_embeddings.projection"),
    *norm("layernorm", "post_norm"),
    *norm(f"{_LAYER}layernorm_before", "layers/norm1"),
    *norm(f"{_LAYER}layernorm_after", "layers/norm2"),
    *linear(f"{_LAYER}attention.attention.query", "layers/attention/query"),
    *linear(f"{_LAYER}attention.attention.key", "layers/attention/key"),
    *linear(f"{_LAYER}attention.attention.value", "layers/attention/value"),
    *linear(f"{_LAYER}attention.output.dense", "layers/attention/out"),
    *linear(f"{_LAYER}intermediate.dense", "layers/mlp/fc1"),
    *linear(f"{_LAYER}output.dense", "layers/mlp/fc2"),
)
DPT_RULES: tuple[Rule, ...] = (
    *_trunk_rules("dpt", _VIT_RULES),
    *(
        rule
        for index in range(len(FACTORS))
        for rule in linear(f"neck.reassemble_stage.readout_projects.{index}.0", f"readout{index}")
    ),
    *_decoder(),
    *_convolution("head.head.0", "head1"),
    *_convolution("head.head.2", "head2"),
    *_convolution("head.head.4", "head3"),
)

ANYTHING_RULES: tuple[Rule, ...] = (
    *_trunk_rules("backbone", dino.dinov2_rules(gated=False)),
    *_decoder(),
    *_convolution("head.conv1", "head1"),
    *_convolution("head.conv2", "head2"),
    *_convolution("head.conv3", "head3"),
)


def features(module: nn.Module, params: Any, pixels: jax.Array) -> ExpertFeatures:
    """Returns the inverse depth (B, S, S, 1), up to scale and shift, as patches."""
    return ExpertFeatures(patches=module.apply({"params": params}, pixels)[0])


def resize_bilinear(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Resizes position embeddings as DPT does: bilinearly, half-pixel centres, no antialias filter.

    Args:
      table: (1 + n * n, D), CLS first.
      grid: (rows, columns) wanted.

    Returns:
      (1 + rows * columns, D).
    """
    side = round((table.shape[0] - 1) ** 0.5)
    places = table[1:].astype(np.float64).reshape(side, side, -1)
    vertical, horizontal = linear_matrix(side, grid[0]), linear_matrix(side, grid[1])
    places = np.einsum("rs,cu,sud->rcd", vertical, horizontal, places, optimize=True)
    return np.concatenate([table[:1], places.reshape(-1, table.shape[1]).astype(table.dtype)])


def adapt(tree: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """Brings DPT's position embeddings to the grid of the module."""
    assert isinstance(module, DepthNetwork)
    table = resize_bilinear(tree["backbone"]["position_embed"], module.backbone["position_grid"])
    return {**tree, "backbone": {**tree["backbone"], "position_embed": table}}


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of transformer and decoder.

    Attributes:
      trunk: width, layers, heads and MLP width of the transformer.
      layers: the layers read.
      neck: channels of the four maps.
      fusion: channels of the fused ones.
      parameters: of the whole network.
    """

    trunk: tuple[int, int, int, int]
    layers: tuple[int, int, int, int]
    neck: tuple[int, int, int, int]
    fusion: int
    parameters: int


def _trunk(size: Size, patch: int, pixels: int, **fields: Any) -> dict[str, Any]:
    width, depth, heads, mlp_width = size.trunk
    grid = (pixels // patch,) * 2
    return {"patch_size": patch, "width": width, "depth": depth, "heads": heads, "mlp_width": mlp_width,
            "position_grid": grid, **fields}  # fmt: skip


def dpt_row(name: str, title: str, weights: str, size: Size, pixels: int = 384) -> Published:
    """Returns the row of a DPT with patches of 16 pixels, whose positions follow the input's size."""

    def build(pixels: int) -> DepthNetwork:
        trunk = _trunk(size, 16, pixels, norm_epsilon=1e-12)
        return DepthNetwork(trunk, size.layers, size.neck, size.fusion, readout=True)

    card = ExpertCard(
        name=name,
        title=title,
        paper="Ranftl, Bochkovskiy and Koltun, Vision Transformers for Dense Prediction, ICCV 2021, arXiv:2103.13413",
        weights=weights,
        licence="Apache-2.0",
        view=View(pixels, "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        grid=(pixels, pixels),
        width=1,
        checked_against="transformers' DPTForDepthEstimation",
        parameters=size.parameters,
    )
    # Twice the patch: the coarsest map halves the grid.
    return Published(card, build, DPT_RULES, features, ignore=DPT_IGNORE, adapt=adapt, multiple=32)


def anything_row(
    name: str, title: str, weights: str, licence: str, size: Size, *, second: bool = True, pixels: int = 518
) -> Published:
    """Returns the row of a Depth Anything, of its second version or its first."""
    trunk = _trunk(size, 14, pixels, block={"layer_scale": True})
    network = DepthNetwork(trunk, size.layers, size.neck, size.fusion, normed=True)
    card = ExpertCard(
        name=name,
        title=title,
        paper="Yang et al., Depth Anything V2, NeurIPS 2024, arXiv:2406.09414"
        if second
        else "Yang et al., Depth Anything, CVPR 2024, arXiv:2401.10891",
        weights=weights,
        licence=licence,
        # Published with the aspect kept and the shorter side at 518; here the centre square.
        view=View(pixels, "crop", "bicubic", IMAGENET_MEAN, IMAGENET_STD),
        grid=(pixels, pixels),
        width=1,
        checked_against="transformers' DepthAnythingForDepthEstimation",
        parameters=size.parameters,
    )
    return Published(card, lambda size: network, ANYTHING_RULES, features, ignore=ANYTHING_IGNORE, multiple=14)


_TRUNKS = {"s": (384, 12, 6, 1536), "b": (768, 12, 12, 3072), "l": (1024, 24, 16, 4096)}
_NECKS = {"s": (48, 96, 192, 384), "b": (96, 192, 384, 768), "l": (256, 512, 1024, 1024)}
_FUSIONS = {"s": 64, "b": 128, "l": 256}
_NAMES = {"s": "Small", "b": "Base", "l": "Large"}
_PARAMETERS = {"s": 24_710_849, "b": 97_174_849, "l": 334_134_465}


def _anything(kind: str, second: bool) -> Published:
    # The first version reads the last four layers; the second spreads them (zero-based here).
    spread = (4, 11, 17, 23) if kind == "l" else (2, 5, 8, 11)
    depth = _TRUNKS[kind][1]
    layers = spread if second else (depth - 4, depth - 3, depth - 2, depth - 1)
    title = _NAMES[kind]
    return anything_row(
        f"depth_anything_v2_{kind}" if second else f"depth_anything_{kind}",
        f"Depth Anything {'V2 ' if second else ''}{title}",
        f"depth-anything/Depth-Anything-V2-{title}-hf" if second else f"LiheYoung/depth-anything-{title.lower()}-hf",
        "CC-BY-NC-4.0" if second and kind != "s" else "Apache-2.0",
        Size(_TRUNKS[kind], layers, _NECKS[kind], _FUSIONS[kind], _PARAMETERS[kind]),
        second=second,
    )


ROWS: tuple[Published, ...] = (
    dpt_row("depth", "DPT-Large (MiDaS 3.0)", "Intel/dpt-large",
            Size(_TRUNKS["l"], (5, 11, 17, 23), _NECKS["l"], 256, 341_850_305)),
    *(_anything(kind, second) for second in (False, True) for kind in "sbl"),
)  # fmt: skip
