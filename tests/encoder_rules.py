"""What the encoders' tests share: weights and inputs drawn by a rule, published names and shapes in short.

Goldens under ``tests/goldens/encoders`` hold outputs alone; their weights come from here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

ENCODERS = Path(__file__).parent / "goldens" / "encoders"
Shapes = dict[str, tuple[int, ...]]


def draw_weights(shapes: Mapping[str, tuple[int, ...] | list[int]]) -> dict[str, np.ndarray]:
    """Draws float32 weights: the i-th name in sorted order from ``RandomState(i)``, scaled by its kind."""
    weights = {}
    for index, name in enumerate(sorted(shapes)):
        shape = tuple(shapes[name])
        n = np.random.RandomState(index).standard_normal(shape).astype(np.float32)
        if "running_var" in name:
            n = 1 + 0.1 * n**2
        elif "running_mean" in name:
            n = 0.1 * n
        elif "pos_embed" in name:
            n = 0.02 * n
        elif len(shape) > 1:
            n = n / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("weight"):
            n = 1 + 0.1 * n
        else:
            n = 0.1 * n
        weights[name] = n.astype(np.float32)
    return weights


def draw_input(seed: int, shape: tuple[int, ...] | list[int], scale: float = 1.0) -> np.ndarray:
    """Draws a float32 input in torch's layout, channels first."""
    return np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32) * np.float32(scale)


def fold(shapes: Mapping[str, tuple[int, ...] | list[int]], which: int = 0) -> dict[str, list]:
    """Shortens names and shapes: the first index in a name (the last, where `which` is -1) becomes ``*``.

    Returns ``{pattern: [[shape, indices], ...]}``, indices None for a name without one.
    """
    folded: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for name, shape in shapes.items():
        numbers = list(re.finditer(r"(?<=\.)\d+(?=\.)", name))
        index = numbers[which] if numbers else None
        pattern = name[: index.start()] + "*" + name[index.end() :] if index else name
        folded.setdefault(pattern, {}).setdefault(tuple(shape), []).extend([int(index[0])] if index else [])
    return {
        pattern: [[list(shape), indices or None] for shape, indices in groups.items()]
        for pattern, groups in sorted(folded.items())
    }


def unfold(folded: Mapping[str, list]) -> Shapes:
    """Undoes `fold`."""
    return {
        pattern.replace("*", str(index)): tuple(shape)
        for pattern, groups in folded.items()
        for shape, indices in groups
        for index in (["*"] if indices is None else indices)
    }


def read_names(file: str) -> dict[str, Shapes]:
    """Reads ``{model: names and shapes}`` of a file under ``tests/goldens/encoders``."""
    content = json.loads((ENCODERS / file).read_text(encoding="utf-8"))
    return {model: unfold(folded) for model, folded in content.items()}


def write_names(file: str, models: Mapping[str, Mapping[str, tuple[int, ...] | list[int]]], which: int = 0) -> None:
    """Writes what `read_names` reads, a pattern a line; `which` as in `fold`."""
    parts = []
    for model, shapes in models.items():
        lines = [f"  {json.dumps(pattern)}: {json.dumps(groups)}" for pattern, groups in fold(shapes, which).items()]
        parts.append(f"{json.dumps(model)}: {{\n" + ",\n".join(lines) + "\n }")
    (ENCODERS / file).write_text("{" + ",\n ".join(parts) + "}\n", encoding="utf-8")
