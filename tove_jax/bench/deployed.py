"""Latency of exported encoders in torch, beside plain CLIP of transformers."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.bench import cases
from tove_jax.bench.sections import Case, Scale, bound, torch_missing
from tove_jax.bench.timing import Clock, Row, alternate, figures, rows
from tove_jax.errors import InputError
from tove_jax.models.vit import encode
from tove_jax.train.objective import DTYPES, make_student

FIRST = "plain CLIP of transformers"
TOLERANCE = 5e-3
"""Mean difference of the float32 outputs, over their mean size: a GPU may round a float32 product's operands."""


def export_cases(scale: Scale) -> list[Case]:
    """Returns the exported encoders, each with every number of pictures."""
    return [
        Case(name, bound(_export, name, size, batch, scale))
        for size, batch in scale.exports
        for name in [f"exported {size} batch {batch} {scale.dtype}"]
    ]


def _export(name: str, size: str, batch: int, scale: Scale, clock: Clock) -> list[Row]:
    """Exports a plain, a MoLE and a MoLA student, loads them as users do, and compares before anything is timed."""
    if missing := torch_missing():
        raise ModuleNotFoundError(missing)
    mole, mola = (cases.config_of(method, size, batch=batch, dtype=scale.dtype) for method in ("move_kd", "hawaii"))
    configs = {FIRST: cases.plain_config(mole), "MoLE, exported": mole, "MoLA, exported": mola}
    pixels = np.random.default_rng(0).standard_normal((batch, *[mole.student.image_size] * 2, 3), np.float32)
    sides: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    operations = {}
    inside: dict[str, Callable[[], Any]] = {}
    for label, config in configs.items():
        params = jax.jit(make_student(config).init)(jax.random.key(0), jnp.asarray(pixels[:1]))["params"]
        sides[label], given = _in_torch(config, jax.device_get(params), pixels, scale.dtype)
        own = label.replace("of transformers", "in tove_jax").replace("exported", "in tove_jax")
        inside[own], facts[own], operations[own], wanted = _in_jax(config, params, pixels)
        operations[label] = operations[own]
        difference = float(np.abs(given - wanted).mean() / np.abs(wanted).mean())
        if not difference <= TOLERANCE:
            raise InputError(f"{name}: {label} gives something else, so it is not timed: it is off by {difference:.2e}")
        facts[label] = {"note": f"off by {difference:.0e} in float32"}
    times = alternate(sides | inside, scale.turns, clock, share=scale.share)
    found = rows(name, times, batch, "images", facts)
    for row in found:
        row.facts.update(figures(operations[row.side], row.seconds.median))
    return found


def _in_torch(config: Any, params: Any, pixels: np.ndarray, dtype: str) -> tuple[Callable[[], Any], np.ndarray]:
    """Exports and loads a student; returns what runs it in ``dtype``, and its last hidden state in float32."""
    import torch
    import transformers

    from tove_jax.hf.export import export_student

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        export_student(config, params, Path(temporary) / "encoder")
        loaded = transformers.AutoModel.from_pretrained(
            str(Path(temporary) / "encoder"), trust_remote_code=True, local_files_only=True, dtype=torch.float32
        )
    if bars:
        transformers.utils.logging.enable_progress_bar()
    model: Any = getattr(loaded, "vision_model", loaded).eval().to(device)
    given = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(device)
    with torch.inference_mode():
        found = model(given).last_hidden_state.cpu().numpy()
    model, given = (thing.to(getattr(torch, dtype)) for thing in (model, given))

    def run() -> None:
        with torch.inference_mode():
            model(given)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run, found


def _in_jax(config: Any, params: Any, pixels: np.ndarray) -> tuple[Callable[[], Any], dict[str, Any], float, Any]:
    """Returns what runs a student in ``train.dtype``, facts, operations, and its last tokens in float32."""
    student, last = make_student(config), f"layers/{config.student.layers - 1}"
    precise = make_student(dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="float32")))

    def forward(student: Any, params: Any, pixels: jax.Array) -> jax.Array:
        return encode(student, params, pixels, (last,))[last]

    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda *given: forward(precise, *given))(params, pixels)
    dtype = DTYPES[config.train.dtype]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    run, facts, flops = cases.timed_function(lambda *given: forward(student, *given), params, jax.device_put(pixels))
    return run, facts, flops, np.asarray(wanted)
