"""MoVE-KD's loss in torch, at its defaults; its terms are those of `tove_jax.methods.move_kd`."""

from __future__ import annotations

from typing import Any

from tove_jax.bench.torch_tower import Way, dense
from tove_jax.config.schema import Config
from tove_jax.methods.move_kd import teachers


def extra(config: Config, params: Any) -> Any:
    """Returns the encoder adapters."""
    from torch import nn

    del config
    return nn.ModuleDict(
        {
            name: nn.ModuleDict({part: dense(values) for part, values in own.items()})
            for name, own in params["method"].items()
        }
    )


def outputs(config: Config, model: Any, pixels: Any, way: Way) -> Any:
    """Runs the student."""
    del config, way
    return model.tower(pixels)


def objective(config: Config, model: Any, seen: Any, features: Any, words: Any, way: Way) -> Any:
    """Returns the loss."""
    import torch
    from torch.nn import functional

    del words, way
    method: Any = config.method
    names, adapters = teachers(config), model.extra
    clip, student = features[names[0]], seen.tokens[:, 1:].float()
    weight = torch.softmax(clip["cls_attention"], dim=-1)
    losses, scores = [], []
    for name in names:
        target = features[name]["patches"].flatten(1, 2)
        if name != names[0]:
            hidden = functional.gelu(adapters[name]["channel"](target))
            target = adapters[name]["token"](hidden.transpose(1, 2)).transpose(1, 2)
            scores.append((clip["summary"] * target.float().mean(dim=1)).sum(dim=-1))
        error = (student - target.float()).square().mean(dim=-1)
        losses.append(error.mean(dim=-1) + (weight * error).sum(dim=-1))
    share = torch.softmax(torch.stack(scores, dim=-1), dim=-1)
    fired = share.mean(dim=0).max() > method.saturation_threshold
    share = torch.where(fired, torch.softmax(share, dim=-1), share)
    pinned = torch.full_like(share[:, :1], method.clip_weight)
    weights = torch.cat([pinned, (1 - method.clip_weight) * share], dim=-1)
    kd = (weights * torch.stack(losses, dim=-1)).sum(dim=-1).mean()
    probs, choice = torch.stack(seen.probs["all"]), torch.stack(seen.choice["all"])
    balance = (probs.mean(dim=0) * choice.mean(dim=0)).sum(dim=-1).mean()
    return method.kd_weight * kd + method.balance_weight * balance
