"""What a checkpoint says of itself, wherever it is kept, and what a run that goes on from it must have alike."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import tove_jax
from tove_jax.config import Config, from_json, to_json
from tove_jax.errors import InputError

FORMAT = "tove_jax-checkpoint-1"
# Fields that may differ between the processes of a run: where things lie, and how they are read.
PLACES = (
    "title",
    "features.path",
    "data.path",
    "data.images",
    "data.annotations",
    "data.cache",
    "data.threads",
    "data.prefetch",
)
# Fields that may differ between the run that saved and the run that resumes.
FREE_FIELDS = (
    *PLACES,
    "mesh",
    "eval",
    "student.initialize",
    "student.attention",
    "student.remat",
    "method.source",
    "train.start_from",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.replicated_limit_mb",
)


def meta(config: Config, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint says of the run behind it, JSON-ready.

    Args:
      config: the run's settings.
      provenance: hashes and origins of what the weights came from.
    """
    return {
        "format": FORMAT,
        "version": tove_jax.__version__,
        "jax": jax.__version__,
        "config": to_json(config),
        "provenance": dict(provenance),
    }


def require_format(found: Any, where: Path | str) -> None:
    """Refuses what is not `meta` of a checkpoint of ours."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        told = found.get("format") if isinstance(found, dict) else None
        raise InputError(f"{where}: not a checkpoint of ours: expected format {FORMAT}, found {told}")


def require_resumable(
    found: Mapping[str, Any], config: Config, provenance: Mapping[str, Any], where: Path | str
) -> None:
    """Refuses to go on from the checkpoint of another run.

    Args:
      found: the checkpoint's `meta`.
      config: this run's settings; those of `FREE_FIELDS` may differ.
      provenance: this run's.
      where: the checkpoint, for the error.

    Raises:
      InputError: names every setting, or the hash, that differs.
    """
    require_format(found, where)
    _check_settings(from_json(found["config"], f"{where}/meta"), config, where)
    if ("source" in found["provenance"]) != ("source" in provenance):
        before, now = ("with" if "source" in told else "without" for told in (found["provenance"], provenance))
        raise InputError(
            f"{where}: config.train.start_from: began {before} another run's parameters, this run begins {now}"
        )
    for name, value in found["provenance"].items():
        if name in provenance and provenance[name] != value:
            raise InputError(
                f"{where}: was trained with {name} {json.dumps(value)}, this run has {json.dumps(provenance[name])}"
            )


def require_shapes(saved: Mapping[str, Any], like: Mapping[str, Any], where: Path | str) -> None:
    """Refuses saved arrays that are not those of a run.

    Args:
      saved: name -> shape.
      like: name -> array.
      where: the checkpoint, for the error.
    """
    missing, extra = sorted(set(like) - set(saved)), sorted(set(saved) - set(like))
    if missing or extra:
        raise InputError(f"{where}: missing {missing[:10]}, unexpected {extra[:10]}")
    for name, leaf in like.items():
        if tuple(saved[name]) != tuple(leaf.shape):
            raise InputError(f"{where}: {name}: expected shape {tuple(leaf.shape)}, found {tuple(saved[name])}")


def kept_frozen(config: Config, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the frozen weights that a run keeps: not those of a language model from ``language.initialize``."""
    return {
        name: leaf
        for name, leaf in frozen.items()
        if not (config.language.initialize and name.startswith("language/model/"))
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for name, value in values.items():
        result.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return result


def settings_of(config: Config) -> dict[str, Any]:
    """Returns every setting by its dotted name."""
    return _flat(dataclasses.asdict(config))


def _check_settings(saved: Config, config: Config, where: Path | str) -> None:
    old, new = settings_of(saved), settings_of(config)
    changed = [
        f"config.{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
        and not any(name == free or name.startswith(free + ".") for free in FREE_FIELDS)
    ]
    if changed:
        raise InputError(f"{where}: cannot resume with other settings (use another --workdir): " + "; ".join(changed))
