"""The finished run that a merge begins from: its settings, turned into a merge's, and its parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from tove_jax.config.derive import merged
from tove_jax.config.schema import Config, MergeConfig, ToVEConfig
from tove_jax.data.vocabulary import Vocabulary
from tove_jax.errors import InputError
from tove_jax.files import mirror
from tove_jax.files.weights import hash_arrays
from tove_jax.train.checkpoint import load_settings, load_student, require_finished
from tove_jax.train.state import flatten

# What a merge must have in common with its source; pictures, optimiser and loop are its own.
_SHARED = ("features.experts", "features.standardize")


def merge_settings(run: Path | str, step: int | None = None) -> Config:
    """Returns the settings that merge a finished run into a plain tower.

    Pictures, features, optimiser and loop are those of the run; the tower trains with a tenth of the learning
    rate (`tove_jax.config.derive.MERGE_GROUPS`), and a ToVE run's text loss stays.

    Args:
      run: the run's folder, also of an object store.
      step: a saved step of it; None: its last.

    Raises:
      InputError: no checkpoint there, an unfinished run, or one that is itself merged.
    """
    named = str(run).rstrip("/")
    run = mirror.reading(run)
    stored, provenance = load_settings(run, step)
    require_finished(stored, provenance["step"], run, step)
    if isinstance(stored.method, MergeConfig):
        raise InputError(f"{run}: expected a run with experts or adapters to merge, found one that is merged already")
    settings, features = merged(stored, source=named, step=step or 0), stored.features
    return dataclasses.replace(
        settings,
        title=f"{stored.title or run.name}_merged",
        student=dataclasses.replace(settings.student, initialize=settings.student.initialize or f"{named}/start"),
        features=dataclasses.replace(features, path=features.path or f"{named}/features"),
    )


def read_source(config: Config, start_hash: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads the source's parameters, after checking that they are what the settings say.

    Args:
      config: a merge's settings.
      start_hash: of the start's weights as this run reads them.

    Returns:
      ``{"student", "method"}`` on the host, and hashes: ``source``, of all of them, and what the source
      itself came from, under the names of its provenance.

    Raises:
      InputError: no such run, an unfinished one, other settings or another start than this merge has.
    """
    method = config.method
    if not method.source:
        raise InputError("config.method.source: expected the folder of a finished run; `tove merge RUN` fills it in")
    run = mirror.reading(method.source)
    stored, params, provenance = load_student(run, method.source_step or None)
    require_finished(stored, provenance["step"], run, method.source_step)
    _require_same(config, stored, run)
    if provenance["start"] != start_hash:
        raise InputError(
            f"config.student.initialize: is not the start of {run}: {provenance['start']} expected, found {start_hash}"
        )
    if method.text_weight:
        Vocabulary.read(run, provenance.get("vocabulary"))
    params = jax.device_get(params)
    origins = {name: value for name, value in provenance.items() if name.startswith("expert/")}
    return params, {**origins, "source": hash_arrays(flatten(params))}


def _require_same(config: Config, stored: Config, run: Path) -> None:
    """Refuses settings under which the source's parameters would be read as something else."""
    if isinstance(stored.method, MergeConfig):
        raise InputError(f"config.method.source: {run} is merged already")
    ours, theirs = dataclasses.asdict(config), dataclasses.asdict(stored)
    pairs: list[tuple[str, Any, Any]] = []
    for name in ours["student"]:
        if name not in ("adapter", "initialize", "attention", "remat"):
            pairs.append((f"student.{name}", ours["student"][name], theirs["student"][name]))
    for path in _SHARED:
        section, name = path.split(".")
        pairs.append((path, ours[section][name], theirs[section][name]))
    pairs.append(("method.source_adapter", ours["method"]["source_adapter"], theirs["student"]["adapter"]))
    # Which experts are attached may differ: they can be detached without retraining.
    free = ("attach_all", "attached") if isinstance(stored.method, ToVEConfig) else ()
    source = ours["method"]["source_method"]
    pairs += [
        (f"method.source_method.{name}", source.get(name), value)
        for name, value in theirs["method"].items()
        if name not in free
    ]
    for path, found, expected in pairs:
        if found != expected:
            raise InputError(f"config.{path}: expected {expected!r}, as {run} was trained, found {found!r}")
