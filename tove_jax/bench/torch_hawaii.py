"""HAWAII's loss in torch, at its defaults; its terms are those of `tove_jax.methods.hawaii`.

No code of HAWAII is public: `released` is its paper in the style of the released MoVE-KD code, one pass of the student
after another. `well` runs all passes in one.
"""

from __future__ import annotations

import math
from typing import Any

from tove_jax.adapters.mlp_head import unshuffle_factor
from tove_jax.bench.torch_tower import Way, two_layers
from tove_jax.config.schema import Config


def extra(config: Config, params: Any) -> Any:
    """Returns the heads."""
    from torch import nn

    del config
    return nn.ModuleDict({name: two_layers(own) for name, own in params["method"].items()})


def outputs(config: Config, model: Any, pixels: Any, way: Way) -> Any:
    """Runs the routed pass and a forced one for each teacher; returns the first, and the others' tokens."""
    count = len(config.features.names)
    if way == "released":
        return model.tower(pixels), [model.tower(pixels, forced=teacher).tokens for teacher in range(count)]
    seen = model.tower(pixels, passes=count)
    routed, *forced = seen.tokens.chunk(1 + count)
    return seen._replace(tokens=routed), forced


def unshuffle(patches: Any, grid: int) -> Any:
    """Brings patches (B, H, W, C) to the student's tokens, (B, grid * grid, k * k * C)."""
    from torch.nn import functional

    batch, height, width, channels = patches.shape
    k = unshuffle_factor(height, width, grid, "space_to_depth")
    if (height, width) != (k * grid, k * grid):
        maps = functional.interpolate(patches.permute(0, 3, 1, 2), (k * grid, k * grid), mode="bilinear")
        patches = maps.permute(0, 2, 3, 1)
    cells = patches.reshape(batch, grid, k, grid, k, channels).transpose(2, 3)
    return cells.reshape(batch, grid * grid, k * k * channels)


def objective(config: Config, model: Any, seen: Any, features: Any, words: Any, way: Way) -> Any:
    """Returns the loss."""
    import torch

    del words, way
    method: Any = config.method
    names, heads = config.features.names, model.extra
    first, forced = seen
    routed = first.tokens[:, 1:].float()
    grid = math.isqrt(routed.shape[1])
    cells = [unshuffle(features[name]["patches"], grid) for name in names]
    fine: Any = 0.0
    for name, cell, tokens in zip(names, cells, forced, strict=True):
        wanted = heads[name](cell)
        logits = (wanted @ wanted.transpose(1, 2)).float() * wanted.shape[-1] ** -0.5
        scores = torch.softmax(logits, dim=-1).mean(dim=1)
        error = (tokens[:, 1:].float() - wanted.float()).square().mean(dim=-1)
        fine = fine + (scores * error).sum(dim=-1).mean() / len(names)
    fused = heads["coarse"](torch.cat(cells, dim=-1))
    coarse = (routed - fused.float()).square().mean(dim=(1, 2)).mean()
    balance: Any = 0.0
    layers = int(config.student.feature.removeprefix("layers/")) % config.student.layers + 1
    for name in first.probs:
        # Over the tokens of the whole batch, layer by layer.
        probs, choice = (torch.stack(values[name][:layers]).mean(dim=1) for values in (first.probs, first.choice))
        balance = balance + probs.shape[-1] * (probs * choice).sum(dim=-1).mean()
    return method.kd_weight * (fine + coarse) + method.balance_weight * balance
