"""A method's training step in torch, the other side of the benchmark; torch is imported when a step is made.

Two ways of one computation, from the same weights, features precomputed; see `tove_jax.bench.torch_tower` and the
module of each method. `well` has, beside what is said there, frozen weights in the compute dtype, fused AdamW and
`torch.compile` where it works. On a GPU both compute under autocast to bfloat16, on a processor in the step's dtype.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from tove_jax.bench import torch_hawaii, torch_move_kd, torch_tove
from tove_jax.bench.torch_tower import Way, tower
from tove_jax.config.schema import Config
from tove_jax.data.view import View

METHODS: dict[str, Any] = {"move_kd": torch_move_kd, "hawaii": torch_hawaii, "tove": torch_tove}
"""Each module has ``extra``, ``outputs`` and ``objective``."""

Compiled = Literal["none", "layers", "whole"]
"""What `torch.compile` is given: nothing, every layer and the loss, or all of it as one."""


class TorchStep:
    """A training step in torch; calling it takes one.

    Attributes:
      compile_s: seconds of the first step, where `torch.compile` compiled in it; None without.
      note: what is to be said of it, such as that it could not be compiled.
    """

    def __init__(
        self, config: Config, params: Any, batch: Any, way: Way, *, everything: bool, compiled: Compiled = "none"
    ) -> None:
        """Copies weights and batch.

        Args:
          config: of the step.
          params: ``{"student", "method"}``, nested, NumPy.
          batch: of `tove_jax.bench.cases.draw_batch`.
          way: see `tove_jax.bench.torch_tower`.
          everything: train the tower too, where the method ever does: ToVE's is frozen.
          compiled: of `well`.
        """
        import torch
        from torch import nn

        self.torch = torch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.half = config.train.dtype == "bfloat16"
        self.config, self.way = config, way
        self.method = METHODS[config.method.name]
        self.model: Any = nn.Module()
        student: Any = tower(config, params["student"], way)
        self.model.tower, self.model.extra = student, self.method.extra(config, params)
        self.model.to(self.device)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(everything and config.method.name != "tove" or ".moe." in name)
            if way == "well" and self.half and not parameter.requires_grad and parameter.dim() > 1:
                parameter.data = parameter.data.to(torch.bfloat16)
        self.trained: Any = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optim = config.optim
        options = {"fused": True} if way == "well" and self.device.type == "cuda" else {}
        self.optimizer: Any = torch.optim.AdamW(
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
        words = batch.get("captions")
        self.words = None if words is None else torch.from_numpy(words).long().to(self.device)
        self.loss_of: Any = self._loss
        self.objective: Any = self.method.objective
        self.note = ""
        self.compile_s: float | None = None
        self._compiled: Compiled = compiled if way == "well" else "none"
        if self._compiled != "none" and os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            self._compiled, self.note = "none", "without torch.compile, by TORCHDYNAMO_DISABLE"

    def _tensor(self, value: np.ndarray) -> Any:
        if not self.half or value.dtype.name != "bfloat16":
            return self.torch.from_numpy(np.asarray(value, np.float32)).to(self.device)
        # Features are stored in half precision on both sides; NumPy's has no counterpart in torch.
        return self.torch.from_numpy(value.view(np.int16)).view(self.torch.bfloat16).to(self.device)

    def _loss(self, pixels: Any, features: Any, words: Any) -> Any:
        with self.torch.autocast(self.device.type, self.torch.bfloat16, enabled=self.half):
            x = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
            found = self.method.outputs(self.config, self.model, x, self.way)
            return self.objective(self.config, self.model, found, features, words, self.way)

    def first(self) -> dict[str, float]:
        """Takes the first step, compiling where that is asked for and works.

        Raises:
          MemoryError: the GPU has too little.
        """
        try:
            return self._first()
        except self.torch.OutOfMemoryError as error:
            self.optimizer = self.model = self.trained = None
            self.torch.cuda.empty_cache()
            raise MemoryError(f"out of memory: {str(error).splitlines()[0][:80]}") from None

    def _first(self) -> dict[str, float]:
        if self._compiled == "none":
            return self()
        began = time.perf_counter()
        try:
            if self._compiled == "whole":
                self.loss_of = self.torch.compile(self._loss)
            else:
                for layer in self.model.tower.layers:
                    layer.compile()
                self.objective = self.torch.compile(self.objective)
            found = self()
            self.compile_s = time.perf_counter() - began
            return found
        except self.torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compiler's many kinds
            self.loss_of, self.objective = self._loss, self.method.objective
            for layer in self.model.tower.layers:
                layer._compiled_call_impl = None
            self.note = f"torch.compile failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
        return self()

    def __call__(self) -> dict[str, float]:
        """Takes a step; returns its loss and gradient norm when it is done."""
        loss = self.loss_of(self.pixels, self.features, self.words)
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


def agree(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], tolerance: float) -> str:
    """Returns what differs between two sides' first steps by more than the tolerance; empty: nothing.

    Gradient norms, and all figures after the first step, may differ by ten times as much: near a tie two sides send a
    token to different experts, and Adam's first step goes by the sign of a gradient alone.
    """
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for name, allowed in (("loss/total", tolerance if number == 1 else 10 * tolerance), ("optim/gradient_norm", 10 * tolerance)):  # fmt: skip
            if not math.isclose(mine[name], other[name], rel_tol=allowed):
                return f"step {number}: {name}: {mine[name]:.6g} here, {other[name]:.6g} there"
    return ""
