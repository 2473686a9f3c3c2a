"""From one stage to the next: a run begins with the parameters that a finished run, or an export, ended with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tove_jax.config.schema import Config, MergeConfig, StudentConfig
from tove_jax.data.vocabulary import Vocabulary
from tove_jax.errors import InputError
from tove_jax.files import mirror
from tove_jax.files.weights import hash_arrays
from tove_jax.hf.load import import_encoder_adapters, import_student, with_image_size
from tove_jax.hf.rules import match_shapes
from tove_jax.train.checkpoint import is_run, load_language, load_settings, load_student, require_finished
from tove_jax.train.state import Flat, flatten, unflatten

_FIELD = "config.train.start_from"
# What shapes do not tell of a student, and must be as it was trained.
_STUDENT_FIELDS = ("patch_size", "heads", "activation", "norm_epsilon")
_ADAPTER_FIELDS = ("kind", "alpha", "routing")


class Handover(NamedTuple):
    """What a run begins with.

    Attributes:
      params: ``{"student", "method"}``, float32, on the host.
      origins: hashes: ``source``, of all that the source holds, and ``expert/{name}`` of its experts.
      notes: sentences on what was left behind, drawn anew or resized, and on settings that differ.
    """

    params: dict[str, Any]
    origins: dict[str, str]
    notes: list[str]


class _Source(NamedTuple):
    leaves: Flat
    student: StudentConfig
    provenance: dict[str, Any]
    config: Config | None  # None for an export


def read_handover(config: Config, fresh: Mapping[str, Any], start_hash: str) -> Handover:
    """Reads the parameters of the run, or export, that ``train.start_from`` names.

    Args:
      config: settings of the run that begins.
      fresh: ``{"student", "method"}`` as they would be without a source; they say what is needed, and their
        tower is the start's.
      start_hash: of the start's weights.

    Returns:
      Every parameter from the source. A tower's weight that the source keeps rounded to its compute dtype, since
      it was frozen, is the start's own. Position embeddings are resized where the picture's size differs. The
      method's parameters are those of `fresh` where the source is an export that has none.

    Raises:
      InputError: no such run or export, an unfinished run, one of another method, start or student, or parameters
        that are missing, unknown or of another shape; all of them are named.
    """
    folder = config.train.start_from
    source = _read(config)
    notes: list[str] = []
    _check_student(config, source.student)
    origins = {"source": hash_arrays(source.leaves)}
    same_size = source.student.image_size == config.student.image_size
    if source.config is not None:
        notes += _differences(config, source.config)
        if same_size:
            _check_start(folder, source, start_hash)
        for name in config.features.names:
            # Another picture's size is another CLIP, as it runs.
            if f"expert/{name}" in source.provenance and (same_size or name != "clip"):
                origins[f"expert/{name}"] = source.provenance[f"expert/{name}"]
    found, wanted = dict(source.leaves), flatten(fresh)
    if not same_size:
        notes.append(f"position embeddings resized from {source.student.image_size} to {config.student.image_size} px")
        tree = {"position_embed": np.asarray(found["student/position_embed"], np.float32)}
        found["student/position_embed"] = with_image_size(
            dataclasses.asdict(source.student), tree, config.student.image_size
        )[1]["position_embed"]
    of_method = [path for path in wanted if path.startswith("method/")]
    if source.config is None and of_method and not any(path.startswith("method/") for path in found):
        notes.append(f"the export holds no parameters of the method: {len(of_method)} drawn anew")
        found |= {path: wanted[path] for path in of_method}
    left = sorted(path for path in found if path.startswith("method/") and path not in wanted)
    if left:
        notes.append(f"left behind, since this run has no use for them: {', '.join(left)}")
    kept = {path: leaf for path, leaf in found.items() if path not in left}
    needed = {path: np.shape(leaf) for path, leaf in wanted.items()}
    match_shapes(kept, needed, f"{_FIELD}: the parameters of {folder} do not fit this run")
    leaves = {path: _unrounded(np.asarray(found[path]), np.asarray(wanted[path])) for path in wanted}
    return Handover(unflatten(leaves), origins, notes)


def handed_vocabulary(config: Config) -> Vocabulary | None:
    """Returns the words that the source's caption head tells apart; None where there is no such run.

    Raises:
      InputError: the run's words are gone, or not those it was trained with.
    """
    folder = mirror.located(config.train.start_from)
    if not folder or not is_run(folder):
        return None
    expected = load_settings(Path(folder))[1].get("vocabulary")
    return None if expected is None else Vocabulary.read(folder, expected)


def source_run(config: Config) -> tuple[Path, int | None] | None:
    """Returns the run that this one goes on from or merges, and its step; None where there is none, or an export."""
    merges = isinstance(config.method, MergeConfig)
    folder, step = (config.method.source, config.method.source_step) if merges else (config.train.start_from, 0)
    folder = mirror.located(folder)
    return (Path(folder), step or None) if folder and is_run(folder) else None


def handed_language(config: Config, origins: Mapping[str, str]) -> Flat:
    """Returns the ``language/...`` leaves that this run takes from another (see `source_run`), on the host.

    Those are what trained there, or was drawn; a run without a language model hands nothing on.

    Args:
      config: settings of the run that begins.
      origins: its hashes ``tokenizer`` and ``language``, as far as it has them.

    Raises:
      InputError: the other run had another kind of language model, tokenizer or published weights.
    """
    source = source_run(config)
    if source is None:
        return {}
    folder, step = source
    stored, provenance = load_settings(folder, step)
    if stored.language.kind == "none":
        return {}
    pairs = [("language.kind", config.language.kind, stored.language.kind)]
    pairs += [(name, origins.get(name), provenance.get(name)) for name in ("tokenizer", "language")]
    for name, found, expected in pairs:
        if found != expected:
            raise InputError(f"{folder}: was trained with {name} {expected!r}, this run has {found!r}")
    return load_language(folder, step)


def _read(config: Config) -> _Source:
    folder = mirror.located(config.train.start_from)
    if is_run(folder):
        stored, params, provenance = load_student(Path(folder))
        require_finished(stored, provenance["step"], Path(folder))
        if stored.method.name != config.method.name:
            raise InputError(
                f"{_FIELD}: expected a run of '{config.method.name}', found one of '{stored.method.name}' in {folder}; "
                "a plain tower goes into config.student.initialize"
            )
        return _Source(flatten(jax.device_get(params)), stored.student, provenance, stored)
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise InputError(f"{_FIELD}: {folder}: expected a run (checkpoints) or an export (config.json), found neither")
    try:
        fields, student = import_student(folder)
        adapters = import_encoder_adapters(folder) if Path(folder).is_dir() else {}
    except InputError as error:
        raise InputError(f"{_FIELD}: {error}") from error
    leaves = flatten({"student": student, "method": adapters} if adapters else {"student": student})
    return _Source(leaves, StudentConfig(**fields), {}, None)


def _check_student(config: Config, source: StudentConfig) -> None:
    ours = config.student
    pairs = [(name, getattr(ours, name), getattr(source, name)) for name in _STUDENT_FIELDS]
    kinds = ours.adapter.kind, source.adapter.kind
    names = ("kind",) if "none" in kinds or kinds[0] != kinds[1] else _ADAPTER_FIELDS
    pairs += [(f"adapter.{name}", getattr(ours.adapter, name), getattr(source.adapter, name)) for name in names]
    for name, found, expected in pairs:
        if found != expected:
            raise InputError(
                f"config.student.{name}: expected {expected!r}, as {config.train.start_from} was trained, found {found!r}"
            )


def _check_start(folder: str, source: _Source, start_hash: str) -> None:
    expected = source.provenance.get("start")
    if expected is not None and expected != start_hash:
        named = source.config.student.initialize if source.config else ""
        raise InputError(
            f"config.student.initialize: is not the start of {folder}"
            f"{f' ({named})' if named else ''}: {expected} expected, found {start_hash}"
        )


def _unrounded(found: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Returns a source's leaf in float32: the start's own where it is that, rounded to the source's dtype."""
    if found.dtype == np.float32:
        return found
    exact = np.asarray(fresh, np.float32)
    return exact if np.array_equal(exact.astype(found.dtype), found) else found.astype(np.float32)


def _differences(config: Config, source: Config) -> list[str]:
    """Returns the settings behind the parameters that are not the source's; shapes do not tell them."""
    ours, theirs = dataclasses.asdict(config), dataclasses.asdict(source)
    pairs = [(f"method.{name}", value, theirs["method"].get(name)) for name, value in ours["method"].items()]
    pairs += [
        (f"features.{name}", ours["features"][name], theirs["features"][name]) for name in ("views", "standardize")
    ]
    pairs += [("student.feature", ours["student"]["feature"], theirs["student"]["feature"])]
    changed = [f"config.{name} was {old!r}, is {new!r}" for name, new, old in pairs if new != old]
    return [f"settings that changed: {'; '.join(changed)}"] if changed else []
