"""A run's ``metrics.json``: who owns which names in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tove_jax.errors import InputError
from tove_jax.files.atomic import atomic_write_json

FEATURES = (
    "knn", "probe", "feature_error", "linear_error", "merge", "seeds", "majority", "pictures", "classes", "step",
)  # fmt: skip
"""What follows ``eval/`` in the names of the features' metrics; a task has its own name there."""


def is_of_features(name: str) -> bool:
    """Whether a metric is one of the features' evaluation."""
    parts = name.split("/")
    return parts[0] == "eval" and parts[1:2] != [] and parts[1] in FEATURES


def replace_metrics(workdir: Path, metrics: Mapping[str, float], owned: Callable[[str], bool]) -> None:
    """Puts metrics into a run's ``metrics.json``; those that are `owned` go, the others stay as they are.

    Args:
      workdir: the run's folder.
      metrics: to write; what is not finite is left out.
      owned: whether a name there is to be replaced.

    Raises:
      InputError: the file there is not a JSON object, or cannot be written.
    """
    path = workdir / "metrics.json"
    present: dict[str, float] = {}
    if path.exists():
        try:
            present = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: expected a JSON object, cannot read it: {error}") from error
        if not isinstance(present, dict):
            raise InputError(f"{path}: expected a JSON object, found {type(present).__name__}")
    kept = {name: value for name, value in present.items() if not owned(name)}
    finite = {name: value for name, value in metrics.items() if np.isfinite(value)}
    atomic_write_json(path, dict(sorted({**kept, **finite}.items())))
