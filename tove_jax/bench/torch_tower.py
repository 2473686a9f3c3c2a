"""CLIP's vision tower in torch, with or without LoRA experts, for the other side of the benchmark.

Two ways of one computation, from the weights of our trees:

    released    eager attention that returns the maps of all layers, every hidden state kept, a loop over the LoRA
                experts that gathers each one's tokens by a boolean mask, as the released MoVE-KD code does
    well        fused attention, one product for all LoRA experts with a mask, no layer beyond what is read

Torch is imported when a tower is made.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from tove_jax.adapters import mola
from tove_jax.config.schema import AdapterConfig, Config

Way = Literal["released", "well"]


class Seen(NamedTuple):
    """What a tower gives of (1 + passes) B pictures, those of a pass side by side, the routed pass first.

    Attributes:
      tokens: (rows, 1+N, D) after the layer that ``student.feature`` names.
      probs, choice: of each layer that ran, by router: mean probability and mean one-hot choice of the routed rows,
        (B, E).
    """

    tokens: Any
    probs: dict[str, list[Any]]
    choice: dict[str, list[Any]]


class Group(NamedTuple):
    """LoRA experts of which a token goes to one: MoLE has one such group, MoLA two.

    Attributes:
      router: its parameters, one linear or two.
      down, up: the experts' parameters beside either linear of the MLP.
    """

    router: Any
    down: Any
    up: Any


def groups(adapter: AdapterConfig, part: Any) -> dict[str, Group]:
    """Returns the groups of one layer's adapter parameters by name."""
    if adapter.kind == "mole":
        return {"all": Group(part["router"], part["down"], part["up"])}
    return {
        name: Group(part[f"router_{name}"], part[f"{name}_down"], part[f"{name}_up"])
        for name in mola.groups(adapter.general_experts)
    }


def tensor(values: Any) -> Any:
    """Returns a copy of an array as a tensor."""
    import torch

    return torch.tensor(np.asarray(values))


def linear(kernel: Any, bias: Any = None) -> Any:
    """Returns a linear layer with weights of ours: kernel (in, out)."""
    from torch import nn

    inputs, outputs = kernel.shape
    # Nothing is drawn that would be overwritten.
    made = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(tensor(np.asarray(kernel).T.copy()))
    if bias is not None:
        made.bias = nn.Parameter(tensor(bias))
    return made


def dense(part: Any) -> Any:
    """Returns a linear layer of ``{"kernel", "bias"}``."""
    return linear(part["kernel"], part["bias"])


def norm(part: Any, epsilon: float = 1e-5) -> Any:
    """Returns a layer norm of ``{"scale", "bias"}``."""
    from torch import nn

    made = nn.LayerNorm(len(part["scale"]), eps=epsilon)
    made.weight.data, made.bias.data = tensor(part["scale"]), tensor(part["bias"])
    return made


def two_layers(part: Any) -> Any:
    """Returns Linear, GELU, Linear of ``{"hidden", "out"}``."""
    from torch import nn

    return nn.Sequential(dense(part["hidden"]), nn.GELU(), dense(part["out"]))


def at(tree: Any, number: int) -> Any:
    """Returns one layer of a stacked tree."""
    if isinstance(tree, dict):
        return {name: at(value, number) for name, value in tree.items()}
    return np.asarray(tree[number])


def tower(config: Config, tree: Any, way: Way) -> Any:
    """Returns a module ``(pixels (B, 3, S, S), forced=None, passes=0) -> Seen`` with the weights of a student's tree.

    ``forced``: every token goes to this teacher's expert alone, and no router runs. ``passes``, for `well`: after the
    routed rows come as many equal lots of rows, each forced to its own teacher's expert; their layers are run in one.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    student, adapter, well = config.student, config.student.adapter, way == "well"
    scale, epsilon = adapter.alpha / adapter.rank, student.norm_epsilon
    straight = adapter.router_gradient == "straight_through"
    stop = int(student.feature.removeprefix("layers/")) % student.layers + 1
    # MoVE-KD's balance is of every layer's router, HAWAII's of those that the feature comes through.
    last_router = well and adapter.kind == "mole" and stop < student.layers

    def activate(x: Any) -> Any:
        return x * torch.sigmoid(1.702 * x) if student.activation == "quick_gelu" else functional.gelu(x)

    class Loop(nn.Module):
        """LoRA experts of one group one after another, each on its own tokens."""

        def __init__(self, part: Any) -> None:
            super().__init__()
            self.first, self.second = (
                nn.ModuleList(
                    linear(kernel[:, e] if side == "a" else kernel[e], bias[e] if bias is not None else None)
                    for e in range(part["a_kernel"].shape[1])
                )
                for side, kernel, bias in (
                    (side, part[f"{side}_kernel"], part.get(f"{side}_bias")) for side in ("a", "b")
                )
            )

        def forward(self, x: Any, index: Any, factor: Any) -> Any:
            added = None
            for expert, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
                mine = index == expert
                if mine.any():
                    made = scale * second(first(x[mine]))
                    made = made if factor is None else made * factor[mine][:, None].to(made.dtype)
                    if added is None:
                        added = made.new_zeros(*x.shape[:-1], made.shape[-1])
                    added[mine] = made
            return added

    class Joint(nn.Module):
        """All LoRA experts of all groups as two products, with a mask between them."""

        def __init__(self, parts: list[Any]) -> None:
            super().__init__()
            kernel = np.concatenate([part["a_kernel"] for part in parts], axis=1)
            width, self.experts, self.rank = kernel.shape
            biased = "a_bias" in parts[0]
            bias = np.concatenate([part["a_bias"] for part in parts]).reshape(-1) if biased else None
            self.first = linear(kernel.reshape(width, -1), bias)
            kernel = np.concatenate([part["b_kernel"] for part in parts])
            self.second = nn.Parameter(tensor(kernel.reshape(self.experts * self.rank, -1)))
            self.bias = nn.Parameter(tensor(np.concatenate([part["b_bias"] for part in parts]))) if biased else None

        def forward(self, x: Any, gate: Any) -> Any:
            hidden = self.first(x).unflatten(-1, (self.experts, self.rank)) * gate[..., None]
            y = hidden.flatten(-2) @ self.second
            return y if self.bias is None else y + gate @ self.bias

    class Moe(nn.Module):
        """Routers and LoRA experts of a layer."""

        def __init__(self, part: Any) -> None:
            super().__init__()
            found = groups(adapter, part)
            self.routers = nn.ModuleDict(
                {
                    name: dense(group.router) if "kernel" in group.router else two_layers(group.router)
                    for name, group in found.items()
                }
            )
            self.down, self.up = (
                Joint([getattr(group, site) for group in found.values()])
                if well
                else nn.ModuleDict({name: Loop(getattr(group, site)) for name, group in found.items()})
                for site in ("down", "up")
            )

        def route(self, x: Any, forced: int | None, passes: int) -> tuple[Any, dict[str, tuple[Any, Any]]]:
            """Returns what `add` takes, and by router the mean probability and choice."""
            if forced is not None:
                return {"teacher": (x.new_full(x.shape[:-1], forced, dtype=torch.long), None)}, {}
            chosen, masks, told = {}, [], {}
            x = x[: len(x) // (1 + passes)]
            for name, router in self.routers.items():
                probs = torch.softmax(router(x).float(), dim=-1)
                index = probs.argmax(dim=-1)
                choice = functional.one_hot(index, probs.shape[-1]).float()
                factor = 1 + (probs - probs.detach()) if straight else None
                told[name] = (probs.mean(dim=1), choice.mean(dim=1))
                chosen[name] = (index, None if factor is None else factor.gather(-1, index[..., None])[..., 0])
                masks.append(choice if factor is None else choice * factor)
            if not well:
                return chosen, told
            gate = torch.cat(masks, dim=-1)
            if passes:
                alone = torch.eye(passes, gate.shape[-1], device=gate.device)
                alone = alone[:, None, None].expand(passes, *gate.shape).flatten(0, 1)
                gate = torch.cat([gate, alone])
            return gate * scale, told

        def add(self, site: Any, x: Any, base: Any, chosen: Any) -> Any:
            if well:
                return base + site(x, chosen.to(base.dtype))
            for name, (index, factor) in chosen.items():
                base = base + site[name](x, index, factor).to(base.dtype)
            return base

    class Layer(nn.Module):
        def __init__(self, part: Any) -> None:
            super().__init__()
            attention, mlp = part["attention"], part["mlp"]
            self.norm1, self.norm2 = norm(part["norm1"], epsilon), norm(part["norm2"], epsilon)
            self.query, self.key, self.value, self.out = (
                dense(attention[name]) for name in ("query", "key", "value", "out")
            )
            self.fc1, self.fc2 = dense(mlp["fc1"]), dense(mlp["fc2"])
            self.moe = Moe(mlp["adapter"]) if adapter.kind != "none" else None

        def attend(self, x: Any) -> Any:
            x = self.norm1(x)
            query, key, value = (
                part(x).unflatten(-1, (student.heads, -1)).transpose(1, 2)
                for part in (self.query, self.key, self.value)
            )
            if well:
                y, weights = functional.scaled_dot_product_attention(query, key, value), None
            else:
                scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
                weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
                y = weights @ value
            return self.out(y.transpose(1, 2).flatten(-2)), weights

        def forward(self, x: Any, whole: bool = True, forced: int | None = None, passes: int = 0) -> Any:
            y, weights = self.attend(x)
            x = x + y
            y = self.norm2(x)
            if self.moe is None:
                return x + self.fc2(activate(self.fc1(y))), weights, {}
            chosen, told = self.moe.route(y, forced, passes)
            if whole:
                hidden = activate(self.moe.add(self.moe.down, y, self.fc1(y), chosen))
                x = x + self.moe.add(self.moe.up, hidden, self.fc2(hidden), chosen)
            return x, weights, told

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Parameter(tensor(np.asarray(tree["patch_embed"]["kernel"]).transpose(3, 2, 0, 1)))
            self.cls = nn.Parameter(tensor(tree["class_embed"]))
            self.position = nn.Parameter(tensor(tree["position_embed"]))
            self.pre_norm = norm(tree["pre_norm"], epsilon)
            count = (stop + 1 if last_router else stop) if well else student.layers
            self.layers = nn.ModuleList(Layer(at(tree["layers"], number)) for number in range(count))

        def forward(self, pixels: Any, forced: int | None = None, passes: int = 0) -> Seen:
            x = functional.conv2d(pixels, self.patch, stride=student.patch_size).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + self.position.to(x.dtype)
            x = self.pre_norm(x).repeat(1 + passes, 1, 1)
            states, maps = [x], []
            probs: dict[str, list[Any]] = {}
            choice: dict[str, list[Any]] = {}
            for number, layer in enumerate(self.layers):
                x, weights, told = layer(x, whole=not well or number < stop, forced=forced, passes=passes)
                states.append(x)
                maps.append(weights)
                for name, (mean, chosen) in told.items():
                    probs.setdefault(name, []).append(mean)
                    choice.setdefault(name, []).append(chosen)
            return Seen(states[stop], probs, choice)

    return Tower()
