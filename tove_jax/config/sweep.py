"""Sweeps: several named settings that are trained over the same seeds and compared, and the door they come in by."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tove_jax.config.door import freeze
from tove_jax.config.schema import Config
from tove_jax.errors import InputError, nearest

#: Settings that every row has alike: then start, features and held-out pictures are the same, and rows can be paired.
SHARED = (
    "data",
    "eval",
    "features.path",
    "features.codec",
    "student.initialize",
    "student.image_size",
    "student.patch_size",
    "student.width",
    "student.layers",
    "student.heads",
    "student.mlp_width",
    "student.activation",
    "student.norm_epsilon",
    "student.feature",
    "student.view",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Attributes:
      name: also the name of its folder.
      config: the settings; each run has the sweep's seed in place of ``train.seed``.
      against: name of the row it adds something to; of the baseline unless the file says; empty for the baseline.
    """

    name: str
    config: Config
    against: str


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is compared.

    Attributes:
      rows: in the order of the table.
      seeds: of every row.
      baseline: name of the row that all others are compared with.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    baseline: str

    def only(self, rows: Sequence[str] = (), seeds: Sequence[int] = ()) -> Sweep:
        """Returns a part of the sweep.

        Args:
          rows: names of the rows that stay; all when empty.
          seeds: in place of the sweep's own; those when empty.

        Raises:
          InputError: no such row, or a seed twice or negative.
        """
        names = [row.name for row in self.rows]
        for name in rows:
            if name not in names:
                raise InputError(f"--rows: no row '{name}'{nearest(name, names)}; rows: {', '.join(names)}")
        kept = tuple(row for row in self.rows if not rows or row.name in rows)
        return dataclasses.replace(self, rows=kept, seeds=_seeds(seeds or self.seeds, "--seeds"))


def from_sweep_file(path: str) -> Sweep:
    """Reads ``file.py[:argument]``, whose ``get_sweep(argument)`` returns what `check` takes.

    Raises:
      InputError: no such file, no such function in it, or what `check` raises.
    """
    file, _, argument = path.partition(":")
    function = _function(file, "get_sweep")
    try:
        return check(function(argument), file)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: get_sweep: {error}") from error


def settings_of(path: Path | str, argument: str = "") -> ConfigDict:
    """Returns what a config file's ``get_config(argument)`` gives, for sweep files to change.

    Raises:
      InputError: no such file, or no such function in it.
    """
    return _function(path, "get_config")(argument)


def check(values: Any, where: str) -> Sweep:
    """Checks a sweep and freezes its settings.

    Args:
      values: ``{"baseline": name, "seeds": (1, 2, ...), "rows": [{"name": ..., "config": ConfigDict,
        "against": name of a row above, may be left out}, ...]}``.
      where: the file, for errors.

    Raises:
      InputError: an unknown or missing field, a name twice or unfit for a folder, an unknown baseline or
        ``against``, settings that the schema refuses, or rows that differ in a field of `SHARED`, or in the
        size they give an expert.
    """
    _fields(values, ("baseline", "seeds", "rows"), (), where)
    if not isinstance(values["rows"], (list, tuple)) or not values["rows"]:
        raise InputError(f"{where}: rows: expected a list of rows, found {values['rows']!r}")
    baseline = values["baseline"]
    rows: list[Row] = []
    for number, given in enumerate(values["rows"]):
        _fields(given, ("name", "config"), ("against",), f"{where}: rows[{number}]")
        name, names = given["name"], [row.name for row in rows]
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise InputError(
                f"{where}: rows[{number}].name: expected letters, digits, '.', '_', '+' or '-', found {name!r}"
            )
        if name.lower() in (one.lower() for one in names):
            raise InputError(f"{where}: rows[{number}].name: '{name}' is there twice")
        against = given.get("against", "" if name == baseline else baseline)
        if against and against != baseline and against not in names:
            raise InputError(
                f"{where}: row '{name}': against: no row '{against}' above it{nearest(str(against), names)}"
            )
        rows.append(Row(name, freeze(given["config"], where=f"{where}: row '{name}': config"), against))
    if baseline not in (row.name for row in rows):
        close = nearest(str(baseline), [row.name for row in rows])
        raise InputError(f"{where}: baseline: no row {baseline!r}{close}")
    _check_shared(rows, where)
    return Sweep(tuple(rows), _seeds(values["seeds"], f"{where}: seeds"), baseline)


def _fields(values: Any, needed: Sequence[str], optional: Sequence[str], where: str) -> None:
    if not isinstance(values, (Mapping, ConfigDict)):
        raise InputError(f"{where}: expected a mapping with {', '.join(needed)}, found {type(values).__name__}")
    known = (*needed, *optional)
    for name in values:
        if name not in known:
            raise InputError(f"{where}.{name}: no such field{nearest(str(name), known)}; fields: {', '.join(known)}")
    if missing := [name for name in needed if name not in values]:
        raise InputError(f"{where}: missing {', '.join(missing)}")


def _seeds(values: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(values, (list, tuple)) and all(type(seed) is int and seed >= 0 for seed in values)
    if not whole or not values or len(set(values)) < len(values):
        raise InputError(f"{where}: expected different whole numbers from 0, found {values!r}")
    return tuple(values)


def _check_shared(rows: Sequence[Row], where: str) -> None:
    first = rows[0]
    specs: dict[str, tuple[str, str]] = {}
    for row in rows:
        for path in SHARED:
            ours, theirs = _at(row.config, path), _at(first.config, path)
            if ours != theirs:
                raise InputError(
                    f"{where}: row '{row.name}': config.{path}: expected what row '{first.name}' has, {theirs!r}, "
                    f"since rows share start, features and pictures; found {ours!r}"
                )
        for spec in row.config.features.experts:
            other, owner = specs.setdefault(spec.partition(":")[0], (spec, row.name))
            if other != spec:
                raise InputError(
                    f"{where}: row '{row.name}': config.features.experts: expected '{other}' as in row '{owner}', "
                    f"since rows share features; found '{spec}'"
                )


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _function(path: Path | str, name: str) -> Any:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"tove_settings_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{path}: expected a function {name}(argument), found none")
    return function
