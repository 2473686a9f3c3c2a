"""Reads a run's folder into one plain object, so that pages are made and tested without a model."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tove_jax.errors import InputError
from tove_jax.report.asked import Asked, TaskScores, read_scores


@dataclasses.dataclass(frozen=True)
class Panel:
    """One small image beside a picture.

    Attributes:
      column: heading, the same for every picture.
      group: the section it belongs to.
      image: uint8 (H, W, 3).
      alt: what it shows, in words.
      colour: name of the network for the colour of its heading, or an empty string.
      note: a few words below it.
    """

    column: str
    group: Literal["attention", "weights", "components"]
    image: np.ndarray
    alt: str
    colour: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class PictureMaps:
    """One picture with its panels.

    Attributes:
      id: of the record, or of the photograph.
      caption: in words.
      origin: its kind, e.g. ``held out`` or ``photograph``.
      licence: its own.
      image: uint8 (S, S, 3), the square that all networks saw.
      panels: in the order of the page.
    """

    id: str
    caption: str
    origin: str
    licence: str
    image: np.ndarray
    panels: tuple[Panel, ...]


@dataclasses.dataclass(frozen=True)
class ExpertFacts:
    """What the page says of one expert."""

    name: str
    title: str = ""
    paper: str = ""
    weights: str = ""
    weights_hash: str = ""
    licence: str = ""
    view: str = ""
    features: str = ""


@dataclasses.dataclass(frozen=True)
class RunData:
    """Everything a page shows.

    Attributes:
      title: of the run.
      experts: names in the order that fixes their colours.
      metrics: flat names to numbers, ``metrics.json``.
      history: rows of ``metrics.jsonl``, each with ``step``.
      predictions: ``eval/predictions.json``, or empty.
      detach: ``eval/detach.json``, or empty.
      config: nested settings, or empty.
      defaults: the same tree of defaults, to tell what was changed.
      facts: of each expert.
      pictures_name: name of the source.
      pictures_licence: licence of its pictures.
      provenance: hashes and origins from the checkpoint.
      versions: of the software that made the page.
      pictures: maps.
      tasks: answered ones.
      asked: pictures with what the run's model answers about them.
      missing: what could not be shown: section to the reason and the command that helps.
    """

    title: str
    experts: tuple[str, ...] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    history: tuple[Mapping[str, float | None], ...] = ()
    predictions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    detach: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    facts: tuple[ExpertFacts, ...] = ()
    pictures_name: str = ""
    pictures_licence: str = ""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pictures: tuple[PictureMaps, ...] = ()
    tasks: tuple[TaskScores, ...] = ()
    asked: tuple[Asked, ...] = ()
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, empty when there is no file.

    Raises:
      InputError: the file does not hold a JSON object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: expected a JSON object, cannot read it: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_history(path: Path) -> tuple[dict[str, float | None], ...]:
    """Returns the rows of a ``metrics.jsonl``, empty when there is no file.

    A last line without an end is left out: a killed run stops anywhere.

    Raises:
      InputError: another line is not a JSON object with a ``step``; names the line.
    """
    if not path.exists():
        return ()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "step" not in row:
                raise ValueError("no step")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise InputError(f"{path}: line {number}: expected a JSON object with a step: {error}") from error
        rows.append(row)
    return tuple(rows)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that shaped the numbers."""
    found = {"python": platform.python_version()}
    for name in ("tove_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _shared(workdir: Path) -> dict[str, Any]:
    """Returns what a comparison judged once for all its runs, where the folder is one of its runs, else nothing."""
    if not (workdir / "eval" / "compared.json").exists():
        return {}
    found = read_json(workdir.resolve().parents[1] / "references.json").get("metrics", {})
    return found if isinstance(found, dict) else {}


def require_folder(workdir: Path | str) -> Path:
    """Returns a run's folder.

    Raises:
      InputError: it is not there.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"{workdir}: expected a run's folder, found none; run `tove train` first")
    return workdir


def collect(workdir: Path | str, **known: Any) -> RunData:
    """Reads the files of a run's folder that need no model.

    Args:
      workdir: the run's folder.
      **known: further fields of `RunData`, which win over what is read.

    Returns:
      The run, with ``missing`` filled for the files that are not there. A run of a comparison (`tove compare`)
      also has what that judged once for all of its runs.

    Raises:
      InputError: no such folder, or a file in it that cannot be read.
    """
    workdir = require_folder(workdir)
    metrics = {**_shared(workdir), **read_json(workdir / "metrics.json")}
    missing: dict[str, str] = {}
    if not any(name.startswith("eval/knn/") for name in metrics):
        missing["evaluation"] = "metrics.json has no evaluation yet; run `tove eval`."
    history = read_history(workdir / "metrics.jsonl")
    if not history:
        missing["training"] = "metrics.jsonl is missing or empty; run `tove train`."
    predictions = read_json(workdir / "eval" / "predictions.json")
    if not predictions:
        missing["predictions"] = "eval/predictions.json is missing; run `tove eval`."
    tasks = read_scores(workdir)
    if not tasks and known.get("config", {}).get("language", {}).get("kind", "none") != "none":
        missing["tasks"] = f"Ask it about what it held out: `tove eval --model={workdir} --tasks held_out={workdir}`."
    experts = known.pop("experts", None)
    if experts is None:
        rows = {name for row in history[-1:] for name in row}
        experts = tuple(sorted(name.removeprefix("weight/") for name in rows if name.startswith("weight/")))
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
    fields: dict[str, Any] = {
        "title": workdir.resolve().name,
        "experts": tuple(experts),
        "metrics": numbers,
        "history": history,
        "predictions": predictions,
        "detach": read_json(workdir / "eval" / "detach.json"),
        "tasks": tasks,
        "versions": versions(),
        "missing": {**missing, **known.pop("missing", {})},
    }
    return RunData(**{**fields, **known})
