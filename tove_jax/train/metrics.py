"""Metrics on their way out: JSON lines, TensorBoard, and a progress bar, without stalling the step."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tove_jax.files.atomic import atomic_write_bytes, atomic_write_json


def _summary_writer() -> Any:
    """Imports tensorboardX without the torch that it takes along where there is one: half of a run's start-up."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # which makes importing it an ImportError
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


SummaryWriter = _summary_writer()


class MetricWriter:
    """Appends one row a call to ``metrics.jsonl`` and to TensorBoard event files.

    A row is written only by process 0. Rows after ``resume_step`` are dropped on opening, so that a
    resumed run's file reads like an unbroken one.
    """

    def __init__(self, workdir: Path, resume_step: int, enabled: bool = True) -> None:
        self._enabled = enabled
        if not enabled:
            return
        self._path = workdir / "metrics.jsonl"
        rows = [row for row in read_rows(self._path) if row["step"] <= resume_step]
        atomic_write_bytes(self._path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self._file = self._path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes one row; values are anything ``float`` takes, non-finite ones become null in JSON."""
        if not self._enabled:
            return
        values = {name: float(np.asarray(value)) for name, value in sorted(metrics.items())}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._enabled:
            self._file.close()
            self._board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a ``metrics.jsonl``; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def update_summary(workdir: Path, values: dict[str, float]) -> None:
    """Merges flat names and numbers into ``metrics.json``."""
    path = workdir / "metrics.json"
    present = json.loads(path.read_text()) if path.exists() else {}
    atomic_write_json(path, dict(sorted({**present, **values}.items())))


def progress_bar(total: int, initial: int, enabled: bool) -> tqdm:
    """Returns the loop's bar, with rate and time left."""
    return tqdm(total=total, initial=initial, desc="train", unit="step", disable=not enabled, dynamic_ncols=True)
