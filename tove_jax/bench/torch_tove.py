"""ToVE's loss in torch, at its defaults; its terms are those of `tove_jax.methods.tove`.

No code of ToVE is public. CLIP is frozen and runs without gradients both ways. `released` projects every expert's tokens
as the paper prints it and adds up what comes out; `well` adds up before the second layer, which all experts share.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tove_jax.adapters.map_stem import STRIDE
from tove_jax.bench.torch_tower import Way, dense, norm, tensor
from tove_jax.config.schema import Config, ToVEConfig


def extra(config: Config, params: Any) -> Any:
    """Returns gate, projector, stems and caption head."""
    import torch
    from torch import nn

    own, method = params["method"], config.method
    assert isinstance(method, ToVEConfig)

    def stem(part: Any) -> Any:
        layers: list[Any] = []
        for number in range(4):
            kernel = np.asarray(part[f"conv{number}"]["kernel"]).transpose(3, 2, 0, 1)
            conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, 2, 1, bias=False)
            conv.weight.data = tensor(kernel.copy())
            group = nn.GroupNorm(method.stem_groups, kernel.shape[0])
            group.weight.data, group.bias.data = (tensor(part[f"norm{number}"][name]) for name in ("scale", "bias"))
            layers += [conv, group, nn.ReLU()]
        kernel = np.asarray(part["out"]["kernel"]).transpose(3, 2, 0, 1)
        out = nn.Conv2d(kernel.shape[1], kernel.shape[0], 1)
        out.weight = nn.Parameter(tensor(kernel.copy()))
        out.bias = nn.Parameter(tensor(part["out"]["bias"]))
        return nn.Sequential(*layers, out)

    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.second = dense(own["gate"]), dense(own["second"])
            self.first = nn.ModuleDict({name: dense(part["first"]) for name, part in own["experts"].items()})
            self.stems = nn.ModuleDict(
                {name: stem(part["stem"]) for name, part in own["experts"].items() if "stem" in part}
            )
            head = own["caption_head"]
            self.query = nn.Parameter(torch.tensor(np.asarray(head["query"])))
            self.norm, self.words = norm(head["norm"]), dense(head["out"])

    return Extra()


def outputs(config: Config, model: Any, pixels: Any, way: Way) -> Any:
    """Runs CLIP."""
    import torch

    del config, way
    with torch.no_grad():
        return model.tower(pixels).tokens[:, 1:]


def enriched(model: Any, clip: Any, features: Any, way: Way) -> tuple[Any, Any]:
    """Returns T' (B, N, d) and the gates (B, N, K), of CLIP's tokens."""
    import torch
    from torch.nn import functional

    grid, extra = math.isqrt(clip.shape[1]), model.extra
    gate = torch.softmax(extra.gate(clip).float(), dim=-1)
    hidden = []
    for name, first in extra.first.items():
        maps = features[name]["patches"].permute(0, 3, 1, 2)
        size = grid
        if name in extra.stems:
            low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
            maps, size = 2 * (maps - low) / (high - low) - 1, grid * STRIDE
        if maps.shape[2:] != (size, size):
            maps = functional.interpolate(maps, (size, size), mode="bilinear")
        maps = extra.stems[name](maps) if name in extra.stems else maps
        hidden.append(functional.gelu(first(maps.flatten(2).transpose(1, 2))))
    if way == "released":
        projected = torch.stack([extra.second(one) for one in hidden], dim=2)
        return clip + (gate[..., None].to(projected.dtype) * projected).sum(dim=2), gate
    weights = gate.to(hidden[0].dtype)
    mixed = hidden[0] * weights[..., :1]
    for k, one in enumerate(hidden[1:], 1):
        mixed = mixed + one * weights[..., k : k + 1]
    return clip + extra.second(mixed), gate


def text_loss(model: Any, tokens: Any, words: Any) -> Any:
    """Returns the caption head's loss of tokens (B, N, d) and words (B, L)."""
    import torch

    x = model.extra.norm(tokens).float()
    attention = torch.softmax((x * model.extra.query).sum(dim=-1) * x.shape[-1] ** -0.5, dim=-1)
    logits = model.extra.words((attention[..., None] * x).sum(dim=1)).float()
    return -torch.log_softmax(logits, dim=-1).gather(-1, words).mean(dim=-1).mean()


def objective(config: Config, model: Any, clip: Any, features: Any, words: Any, way: Way) -> Any:
    """Returns the loss."""
    method: Any = config.method
    tokens, gate = enriched(model, clip, features, way)
    importance = gate.sum(dim=(0, 1))
    aux = (importance / importance.mean() - 1).square().mean()
    return method.text_weight * text_loss(model, tokens, words) + method.aux_weight * aux
