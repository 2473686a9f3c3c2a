"""MoVE-KD's training step in torch, the other side of the benchmark; torch is imported when a step is made.

Two ways of one computation, from the same weights, features precomputed:

    released    what the released MoVE-KD code does: eager attention that returns the maps of all layers, every hidden
                state kept, a loop over the LoRA experts that gathers each one's tokens by a boolean mask
    well        torch done well: fused attention, one product for all LoRA experts with a mask, the last layer only as
                far as its router, frozen weights in the compute dtype, fused AdamW, `torch.compile` where it works

On a GPU both compute under autocast to bfloat16, on a processor in float32. The figures of the loss are those of
`tove_jax.methods.move_kd` at its defaults.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any, Literal

import numpy as np

from tove_jax.config.schema import Config
from tove_jax.data.view import View
from tove_jax.methods.move_kd import teachers

Way = Literal["released", "well"]


class TorchStep:
    """A training step in torch; calling it takes one.

    Attributes:
      compile_s: seconds of the first step, where `torch.compile` compiled in it; None without.
      note: what is to be said of it, such as that it could not be compiled.
    """

    def __init__(
        self, config: Config, params: Any, batch: Any, way: Way, *, everything: bool, compiled: bool = True
    ) -> None:
        """Copies weights and batch.

        Args:
          config: of a MoVE-KD step.
          params: ``{"student", "method"}``, nested, NumPy.
          batch: of `tove_jax.bench.cases.draw_batch`.
          way: see the module.
          everything: train the tower too.
          compiled: try `torch.compile` with `well`.
        """
        import torch

        self.torch = torch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.half = config.train.dtype == "bfloat16"
        self.config, self.way = config, way
        self.model = _model(config, params, way).to(self.device)
        if not everything:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name.startswith("teachers") or ".moe." in name)
                if way == "well" and self.half and not parameter.requires_grad and parameter.dim() > 1:
                    parameter.data = parameter.data.to(torch.bfloat16)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optim = config.optim
        options = {"fused": True} if way == "well" and self.device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(
            self.trained, optim.lr, (optim.b1, optim.b2), optim.eps, weight_decay=optim.weight_decay, **options
        )
        view = View.of_student(config.student)
        self.mean, self.std = (
            torch.tensor(value, device=self.device, dtype=torch.float32).view(1, 3, 1, 1)
            for value in (view.mean, view.std)
        )
        self.pixels = torch.from_numpy(batch["pixels"]).to(self.device)
        self.features = {
            name: {key: self._tensor(value) for key, value in payload.items()}
            for name, payload in batch["features"].items()
        }
        self.loss_of: Any = self._loss
        self.note = ""
        self.compile_s: float | None = None
        self._compiled = way == "well" and compiled
        if self._compiled and os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            self._compiled, self.note = False, "without torch.compile, by TORCHDYNAMO_DISABLE"

    def _tensor(self, value: np.ndarray) -> Any:
        tensor = self.torch.from_numpy(np.asarray(value, np.float32)).to(self.device)
        # Features are stored in half precision on both sides.
        return tensor if value.dtype == np.float32 else tensor.to(self.torch.bfloat16)

    def _loss(self, pixels: Any, features: Any) -> Any:
        torch = self.torch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            x = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
            tokens, probs, choice = self.model.tower(x)
            return _objective(self.config, self.model.teachers, tokens, probs, choice, features, self.half)

    def first(self) -> dict[str, float]:
        """Takes the first step, compiling where that is asked for and works."""
        if self._compiled:
            began = time.perf_counter()
            try:
                self.loss_of = self.torch.compile(self._loss)
                found = self()
                self.compile_s = time.perf_counter() - began
                return found
            except Exception as error:  # of the compiler's many kinds
                self.loss_of = self._loss
                self.note = f"torch.compile failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
        return self()

    def __call__(self) -> dict[str, float]:
        """Takes a step; returns its loss and gradient norm when it is done."""
        loss = self.loss_of(self.pixels, self.features)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = self.torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip_norm)
        self.optimizer.step()
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return {"loss/total": float(loss.detach()), "optim/gradient_norm": float(norm)}

    def memory_mib(self) -> float | None:
        """Returns the peak of a step's memory, by torch; None on a processor, where it is not counted."""
        if self.device.type != "cuda":
            return None
        self.torch.cuda.reset_peak_memory_stats()
        self()
        return self.torch.cuda.max_memory_allocated() / 2**20


def _model(config: Config, params: Any, way: Way) -> Any:
    """Builds tower and encoder adapters with the weights of our trees."""
    import torch
    from torch import nn
    from torch.nn import functional

    student, adapter = config.student, config.student.adapter
    tree, well = params["student"], way == "well"
    scale = adapter.alpha / adapter.rank

    def linear(kernel: Any, bias: Any) -> Any:
        made = nn.Linear(*kernel.shape)
        made.weight.data, made.bias.data = torch.tensor(np.asarray(kernel).T.copy()), torch.tensor(np.asarray(bias))
        return made

    def norm(values: Any) -> Any:
        made = nn.LayerNorm(student.width, eps=student.norm_epsilon)
        made.weight.data, made.bias.data = (torch.tensor(np.asarray(values[name])) for name in ("scale", "bias"))
        return made

    def activate(x: Any) -> Any:
        return x * torch.sigmoid(1.702 * x) if student.activation == "quick_gelu" else functional.gelu(x)

    class Loop(nn.Module):
        """LoRA experts one after another, each on its own tokens."""

        def __init__(self, part: Any) -> None:
            super().__init__()
            pairs = range(adapter.experts)
            self.first = nn.ModuleList(linear(part["a_kernel"][:, e], part["a_bias"][e]) for e in pairs)
            self.second = nn.ModuleList(linear(part["b_kernel"][e], part["b_bias"][e]) for e in pairs)

        def forward(self, x: Any, base: Any, index: Any) -> Any:
            added = torch.zeros_like(base)
            for expert in range(adapter.experts):
                mine = index == expert
                if mine.any():
                    added[mine] = (scale * self.second[expert](self.first[expert](x[mine]))).to(base.dtype)
            return base + added

    class Joint(nn.Module):
        """All LoRA experts as two products, with a mask between them."""

        def __init__(self, part: Any) -> None:
            super().__init__()
            width, experts, rank = part["a_kernel"].shape
            self.first = linear(part["a_kernel"].reshape(width, experts * rank), part["a_bias"].reshape(-1))
            self.second = nn.Parameter(torch.tensor(part["b_kernel"].reshape(experts * rank, -1)))
            self.bias = nn.Parameter(torch.tensor(part["b_bias"]))

        def forward(self, x: Any, base: Any, index: Any) -> Any:
            gate = functional.one_hot(index, adapter.experts).to(base.dtype) * scale
            hidden = self.first(x).unflatten(-1, (adapter.experts, adapter.rank)) * gate[..., None]
            return base + hidden.flatten(-2) @ self.second + gate @ self.bias

    class Moe(nn.Module):
        def __init__(self, part: Any) -> None:
            super().__init__()
            kind = Joint if well else Loop
            self.router = linear(part["router"]["kernel"], part["router"]["bias"])
            self.down, self.up = kind(part["down"]), kind(part["up"])

    class Layer(nn.Module):
        out: Any

        def __init__(self, part: Any) -> None:
            super().__init__()
            attention, mlp = part["attention"], part["mlp"]
            self.norm1, self.norm2 = norm(part["norm1"]), norm(part["norm2"])
            for name in ("query", "key", "value", "out"):
                setattr(self, name, linear(attention[name]["kernel"], attention[name]["bias"]))
            self.fc1, self.fc2 = (linear(mlp[name]["kernel"], mlp[name]["bias"]) for name in ("fc1", "fc2"))
            self.moe = Moe(mlp["adapter"])

        def attend(self, x: Any) -> Any:
            x = self.norm1(x)
            query, key, value = (
                getattr(self, name)(x).unflatten(-1, (student.heads, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            if well:
                y, weights = functional.scaled_dot_product_attention(query, key, value), None
            else:
                scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
                weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
                y = weights @ value
            return self.out(y.transpose(1, 2).flatten(-2)), weights

        def forward(self, x: Any, whole: bool = True) -> Any:
            y, weights = self.attend(x)
            x = x + y
            y = self.norm2(x)
            probs = torch.softmax(self.moe.router(y).float(), dim=-1)
            index = probs.argmax(dim=-1)
            if whole:
                hidden = activate(self.moe.down(y, self.fc1(y), index))
                x = x + self.moe.up(hidden, self.fc2(hidden), index)
            return x, weights, probs.mean(dim=1), functional.one_hot(index, adapter.experts).float().mean(dim=1)

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Parameter(torch.tensor(np.asarray(tree["patch_embed"]["kernel"]).transpose(3, 2, 0, 1)))
            self.cls = nn.Parameter(torch.tensor(np.asarray(tree["class_embed"])))
            self.position = nn.Parameter(torch.tensor(np.asarray(tree["position_embed"])))
            self.pre_norm = norm(tree["pre_norm"])
            layers = range(student.layers)
            self.layers = nn.ModuleList(Layer(_at(tree["layers"], number)) for number in layers)

        def forward(self, pixels: Any) -> Any:
            x = functional.conv2d(pixels, self.patch, stride=student.patch_size).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + self.position.to(x.dtype)
            x = self.pre_norm(x)
            states, maps, probs, choice = [x], [], [], []
            for number, layer in enumerate(self.layers):
                x, weights, mean, chosen = layer(x, whole=not well or number + 1 < student.layers)
                states.append(x)
                maps.append(weights)
                probs.append(mean)
                choice.append(chosen)
            return states[-2][:, 1:], torch.stack(probs), torch.stack(choice)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = Tower()
            self.teachers = nn.ModuleDict(
                {
                    name: nn.ModuleDict(
                        {part: linear(values["kernel"], values["bias"]) for part, values in own.items()}
                    )
                    for name, own in params["method"].items()
                }
            )

    return Whole()


def _at(tree: Any, number: int) -> Any:
    """Returns one layer of a stacked tree."""
    if isinstance(tree, dict):
        return {name: _at(value, number) for name, value in tree.items()}
    return np.asarray(tree[number])


def _objective(config: Config, adapters: Any, tokens: Any, probs: Any, choice: Any, features: Any, half: bool) -> Any:
    """Computes MoVE-KD's loss; see `tove_jax.methods.move_kd` for its terms."""
    import torch
    from torch.nn import functional

    method: Any = config.method
    names = teachers(config)
    clip, student = features[names[0]], tokens.float()
    weight = torch.softmax(clip["cls_attention"], dim=-1)
    losses, scores = [], []
    for name in names:
        target = features[name]["patches"].flatten(1, 2)
        target = target if half else target.float()
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
    balance = (probs.mean(dim=0) * choice.mean(dim=0)).sum(dim=-1).mean()
    return method.kd_weight * kd + method.balance_weight * balance


def hed_features(params: Any, normalized: np.ndarray) -> tuple[Any, np.ndarray]:
    """Returns what computes, in torch, the features of the expert `hed`: VGG16 as far as conv5_3.

    Args:
      params: of the expert, NumPy.
      normalized: float32 (B, size, size, 3), as its view normalises.

    Returns:
      A function of nothing that returns when it is done, and its result (B, size/16, size/16, 512) as NumPy.
    """
    import torch
    from torch.nn import functional

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = []
    for name in sorted(name for name in params if name.startswith("conv")):
        kernel, bias = (np.asarray(params[name][part]) for part in ("kernel", "bias"))
        weight = torch.tensor(kernel.transpose(3, 2, 0, 1).copy(), device=device)
        layers.append((name, weight, torch.tensor(bias, device=device)))
    pixels = torch.tensor(normalized.transpose(0, 3, 1, 2).copy(), device=device)

    def run() -> Any:
        x = pixels
        with torch.no_grad():
            for name, weight, bias in layers:
                if name.endswith("_1") and name != "conv1_1":
                    x = functional.max_pool2d(x, 2)
                x = functional.relu(functional.conv2d(x, weight, bias, padding=1))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return x

    return run, run().permute(0, 2, 3, 1).cpu().numpy()


def agree(ours: dict[str, float], theirs: dict[str, float], tolerance: float) -> str:
    """Returns what differs between two sides' first steps, by more than the tolerance; empty: nothing.

    Gradient norms may differ by ten times as much: near a tie two sides send a token to different experts.
    """
    for name, allowed in (("loss/total", tolerance), ("optim/gradient_norm", 10 * tolerance)):
        if not math.isclose(ours[name], theirs[name], rel_tol=allowed):
            return f"{name}: {ours[name]:.6g} here, {theirs[name]:.6g} there"
    return ""
