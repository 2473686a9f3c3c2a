"""Sweeps: several named settings that are trained over the same seeds and compared, and the door they come in by."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tove_jax.config.derive import MERGE_SOURCE_FIELDS, detach, merged
from tove_jax.config.door import freeze
from tove_jax.config.schema import Config, MergeConfig
from tove_jax.config.specs import expert_name
from tove_jax.errors import InputError, nearest

#: Settings that every row has alike: then start, features and held-out pictures are the same, and rows can be paired.
SHARED = (
    "data",
    "eval",
    "features.path",
    "features.codec",
    "features.views",
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
      against: name of the row it adds something to; of the baseline unless the file says, of a derived row the
        one it is made of; empty for the baseline.
      of: name of the row whose trained runs a derived row takes, seed by seed; empty for a row of its own.
      detached: experts that a derived row leaves out when it is judged. A derived row without them is a merge:
        its own short training distils the run into a plain tower.
    """

    name: str
    config: Config
    against: str
    of: str = ""
    detached: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Order:
    """An order that a paper reports.

    Attributes:
      below: name of the row that it found worse.
      above: name of the row that it found better.
      source: where it says so.
    """

    below: str
    above: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is compared.

    Attributes:
      rows: in the order of the table.
      seeds: of every row.
      baseline: name of the row that all others are compared with.
      orders: what the papers found, to be held against what is found.
      start: settings of a run that is trained once, before all others, and whose tower every row starts from;
        None: random weights, or what the rows' own ``student.initialize`` says.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    baseline: str
    orders: tuple[Order, ...] = ()
    start: Config | None = None

    def only(self, rows: Sequence[str] = (), seeds: Sequence[int] = ()) -> Sweep:
        """Returns a part of the sweep.

        Args:
          rows: names of the rows that stay, with those they are derived of; all when empty.
          seeds: in place of the sweep's own; those when empty.

        Raises:
          InputError: no such row, or a seed twice or negative.
        """
        names = [row.name for row in self.rows]
        for name in rows:
            if name not in names:
                raise InputError(f"--rows: no row '{name}'{nearest(name, names)}; rows: {', '.join(names)}")
        wanted = {*rows, *(row.of for row in self.rows if row.name in rows)}
        kept = tuple(row for row in self.rows if not rows or row.name in wanted)
        names = [row.name for row in kept]
        orders = tuple(order for order in self.orders if order.below in names and order.above in names)
        return dataclasses.replace(self, rows=kept, seeds=_seeds(seeds or self.seeds, "--seeds"), orders=orders)


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
      values: ``{"baseline": name, "seeds": (1, 2, ...), "rows": [...], "orders": [...], "start": ConfigDict}``. A row is ``{"name":
        ..., "config": ConfigDict, "against": name of a row above, may be left out}``, or derived of one above:
        ``{"name": ..., "of": name, "detached": names of experts}``, or ``{"name": ..., "of": name, "merge":
        fields of MergeConfig, "settings": {"train.steps": ..., "optim.lr": ...}}`` (also may be left out). An
        order is ``(worse row, better row, where the paper says so)``; ``orders`` may be left out, and so may
        ``start``, the settings of a run whose tower all rows start from.
      where: the file, for errors.

    Raises:
      InputError: an unknown or missing field, a name twice or unfit for a folder, an unknown baseline,
        ``against``, ``of`` or row of an order, settings that the schema refuses, rows that differ in a field
        of `SHARED`, or in the size they give an expert, or a start that no row could begin from.
    """
    _fields(values, ("baseline", "seeds", "rows"), ("orders", "start"), where)
    if not isinstance(values["rows"], (list, tuple)) or not values["rows"]:
        raise InputError(f"{where}: rows: expected a list of rows, found {values['rows']!r}")
    baseline = values["baseline"]
    rows: list[Row] = []
    for number, given in enumerate(values["rows"]):
        place = f"{where}: rows[{number}]"
        derived = isinstance(given, (Mapping, ConfigDict)) and "of" in given
        if derived:
            _fields(given, ("name", "of"), ("against", "detached", "merge", "settings"), place)
        else:
            _fields(given, ("name", "config"), ("against",), place)
        name, names = given["name"], [row.name for row in rows]
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise InputError(f"{place}.name: expected letters, digits, '.', '_', '+' or '-', found {name!r}")
        if name.lower() in (one.lower() for one in names):
            raise InputError(f"{place}.name: '{name}' is there twice")
        usual = given["of"] if derived else "" if name == baseline else baseline
        against = given.get("against", usual)
        if against and against != baseline and against not in names:
            field = "of" if derived and against == given["of"] else "against"
            raise InputError(
                f"{where}: row '{name}': {field}: no row '{against}' above it{nearest(str(against), names)}"
            )
        if derived:
            rows.append(_derived(given, against, rows, f"{where}: row '{name}'"))
        else:
            rows.append(Row(name, freeze(given["config"], where=f"{where}: row '{name}': config"), against))
    names = [row.name for row in rows]
    if baseline not in names:
        raise InputError(f"{where}: baseline: no row {baseline!r}{nearest(str(baseline), names)}")
    _check_shared(rows, where)
    orders = _orders(values.get("orders", ()), names, where)
    start = _start(values["start"], rows[0].config, f"{where}: start") if "start" in values else None
    return Sweep(tuple(rows), _seeds(values["seeds"], f"{where}: seeds"), baseline, orders, start)


def _start(values: Any, row: Config, where: str) -> Config:
    """Returns the settings of the run that makes the start: a tower of the rows' shape, for rows without another."""
    start = freeze(values, where=where)
    if row.student.initialize:
        raise InputError(f"{where}: the rows start from student.initialize '{row.student.initialize}', expected none")
    if start.student.adapter.kind != "none" or start.method.name == "tove":
        raise InputError(
            f"{where}: expected a plain tower that trains, found '{start.student.adapter.kind}' adapters "
            f"under method '{start.method.name}'"
        )
    for path in SHARED:
        if path.startswith("student.") and path not in ("student.initialize", "student.feature"):
            ours, theirs = _at(start, path), _at(row, path)
            if ours != theirs:
                raise InputError(f"{where}.{path}: expected what the rows have, {theirs!r}, found {ours!r}")
    return start


def _derived(given: Mapping[str, Any], against: str, rows: Sequence[Row], where: str) -> Row:
    """Returns a row made of a row above it, whose runs it takes."""
    of = next((row for row in rows if row.name == given["of"]), None)
    if of is None:
        names = [row.name for row in rows]
        raise InputError(f"{where}: of: no row {given['of']!r} above it{nearest(str(given['of']), names)}")
    if of.of:
        raise InputError(f"{where}: of: expected a row with a training of its own, '{of.name}' is derived of '{of.of}'")
    if ("detached" in given) == ("merge" in given):
        raise InputError(f"{where}: expected either detached or merge beside of, found {', '.join(sorted(given))}")
    if "detached" in given:
        names = given["detached"]
        if not isinstance(names, (list, tuple)) or not names or "settings" in given:
            raise InputError(f"{where}: detached: expected names of experts and no settings, found {names!r}")
        try:
            return Row(given["name"], detach(of.config, names), against, of.name, tuple(names))
        except InputError as error:
            raise InputError(f"{where}: of '{of.name}': {error}") from None
    if isinstance(of.config.method, MergeConfig):
        raise InputError(f"{where}: of: '{of.name}' is merged already")
    values = dataclasses.asdict(merged(of.config))
    for name, value in _mapping(given["merge"], f"{where}: merge").items():
        if name in MERGE_SOURCE_FIELDS:
            raise InputError(f"{where}: merge.{name}: is that of row '{of.name}', expected to be left out")
        values["method"][name] = value
    for path, value in _mapping(given.get("settings", {}), f"{where}: settings").items():
        section, _, name = path.partition(".")
        if section not in ("train", "optim") or not name:
            raise InputError(f"{where}: settings: expected train.FIELD or optim.FIELD, found {path!r}")
        values[section][name] = value
    return Row(given["name"], freeze(values, where=f"{where}: config"), against, of.name)


def _mapping(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, (Mapping, ConfigDict)):
        raise InputError(f"{where}: expected a mapping of fields, found {values!r}")
    return values


def _orders(values: Any, names: Sequence[str], where: str) -> tuple[Order, ...]:
    if not isinstance(values, (list, tuple)):
        raise InputError(f"{where}: orders: expected a list of pairs, found {values!r}")
    orders = []
    for number, given in enumerate(values):
        text = isinstance(given, (list, tuple)) and all(isinstance(word, str) for word in given)
        if not text or len(given) not in (2, 3):
            raise InputError(f"{where}: orders[{number}]: expected (worse row, better row, source), found {given!r}")
        for name in given[:2]:
            if name not in names:
                raise InputError(f"{where}: orders[{number}]: no row '{name}'{nearest(name, names)}")
        if given[0] == given[1]:
            raise InputError(f"{where}: orders[{number}]: expected two rows, found '{given[0]}' twice")
        orders.append(Order(*given))
    return tuple(orders)


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
            other, owner = specs.setdefault(expert_name(spec), (spec, row.name))
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
