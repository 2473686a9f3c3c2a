"""The one door: config files and overrides come in, a frozen `Config` comes out, or a clear error."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union

from absl import flags
from ml_collections import ConfigDict, config_flags

from tove_jax.config.schema import Config
from tove_jax.errors import InputError, nearest


def thaw(config: Any) -> ConfigDict:
    """Returns a dataclass of settings as a mutable ConfigDict, for config files to change."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values[field.name] = thaw(value) if dataclasses.is_dataclass(value) else value
    return ConfigDict(values)


def freeze(values: Any, kind: type | None = None, where: str = "config") -> Any:
    """Checks settings against the schema and returns them as frozen dataclasses.

    Args:
      values: ConfigDict or plain mapping with exactly the schema's fields.
      kind: dataclass to build; `Config` when None.
      where: path of this section, for errors.

    Returns:
      An instance of ``kind``.

    Raises:
      InputError: an unknown field (with the nearest valid one), a missing field, a value of another
        type or outside its choices.
    """
    kind = Config if kind is None else kind
    if not isinstance(values, (ConfigDict, dict)):
        raise InputError(f"{where}: expected a section of settings, found {values!r}")
    names = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            raise InputError(f"{where}.{name}: no such field{nearest(name, names)}; fields: {', '.join(names)}")
    missing = [name for name in names if name not in values]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _checked(values[name], hints[name], f"{where}.{name}") for name in names})


def _checked(value: Any, kind: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _chosen(value, inner, where)
    if dataclasses.is_dataclass(kind):
        return freeze(value, typing.cast(type, kind), where)
    if origin is Literal:
        if value not in inner:
            close = nearest(str(value), [str(choice) for choice in inner])
            raise InputError(f"{where}: expected one of {', '.join(map(repr, inner))}, found {value!r}{close}")
        return value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise InputError(f"{where}: expected a tuple, found {value!r}")
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) != len(value):
            raise InputError(f"{where}: expected {len(kinds)} values, found {len(value)}: {value!r}")
        return tuple(_checked(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}: expected {kind.__name__}, found {type(value).__name__} {value!r}")
    return value


def _chosen(value: Any, kinds: Sequence[Any], where: str) -> Any:
    """Picks the dataclass of a union by its ``name``, so that a method is chosen in the config."""
    by_name = _by_name(kinds)
    name = value.get("name") if isinstance(value, (ConfigDict, dict)) else None
    if name not in by_name:
        raise InputError(f"{where}.name: expected one of {', '.join(sorted(by_name))}, found {name!r}")
    return freeze(value, by_name[name], where)


def _by_name(kinds: Sequence[Any]) -> dict[str, Any]:
    """Returns the dataclasses of a union by the defaults of their ``name`` fields."""
    return {str(field.default): kind for kind in kinds for field in dataclasses.fields(kind) if field.name == "name"}


def parse_arguments(text: str, **defaults: Any) -> ConfigDict:
    """Parses what follows the colon in ``--config=file.py:smoke,seed=1``.

    Args:
      text: comma-separated ``name`` (true) or ``name=value``.
      defaults: every argument the file takes, with its default; values take the default's type.

    Returns:
      The arguments.

    Raises:
      InputError: an argument the file does not take, or a value of another type.
    """
    result = dict(defaults)
    for item in filter(None, (text or "").split(",")):
        name, _, value = item.partition("=")
        if name not in defaults:
            raise InputError(f"config argument '{name}': not taken{nearest(name, defaults)}")
        kind = type(defaults[name])
        try:
            result[name] = (value in ("", "true", "True", "1")) if kind is bool else kind(value)
        except ValueError:
            raise InputError(f"config argument '{name}': expected {kind.__name__}, found '{value}'") from None
    return ConfigDict(result)


def from_file(path: str, overrides: Sequence[str] = ()) -> Config:
    """Reads ``file.py[:argument]`` and applies ``--config.a.b=value`` overrides.

    Args:
      path: config file with ``get_config(arg)``, then optionally a colon and its argument.
      overrides: flags as on the command line.

    Returns:
      The frozen settings.

    Raises:
      InputError: no such file, an unknown or ill-typed field, or a value the schema refuses.
    """
    file = path.partition(":")[0]
    if not Path(file).is_file():
        raise InputError(f"--config: no such file {file}")
    return _parse(path, [f"--config={path}"], overrides)


def with_overrides(config: Config, overrides: Sequence[str], where: str) -> Config:
    """Applies ``--config.a.b=value`` overrides to settings that come from elsewhere than a file.

    Args:
      config: the settings.
      overrides: flags as on the command line.
      where: what the settings come from, for errors.

    Raises:
      InputError: as `from_file`.
    """
    return _parse(where, [], overrides, thaw(config))


def _parse(where: str, first: list[str], overrides: Sequence[str], settings: ConfigDict | None = None) -> Config:
    values = flags.FlagValues()
    argv = ["tove", *first, *overrides]
    schema_names = _field_paths(Config)
    for flag in overrides:
        name = flag.lstrip("-").partition("=")[0].removeprefix("config.")
        if name not in schema_names:
            raise InputError(f"config.{name}: no such field{nearest(name, schema_names)}")
    try:
        if settings is None:
            config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        else:
            config_flags.DEFINE_config_dict("config", settings, flag_values=values, sys_argv=argv)
        values(argv)
    except InputError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: {_said(error) or error}") from None
    return freeze(values.config)


def _said(error: BaseException | None) -> InputError | None:
    """Returns the error that a config file raised itself, which its reader wraps with a traceback."""
    found = None
    while error is not None:
        found = error if isinstance(error, InputError) else found
        error = error.__cause__ or error.__context__
    return found


def _field_paths(kind: type, prefix: str = "") -> list[str]:
    paths = []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        paths.append(prefix + field.name)
        for inner in typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,):
            if dataclasses.is_dataclass(inner):
                paths += _field_paths(typing.cast(type, inner), f"{prefix}{field.name}.")
    return paths


def to_json(config: Config) -> str:
    """Returns the settings as indented JSON, as checkpoints and exports keep them."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str, where: str) -> Config:
    """Reads what `to_json` wrote, here or in an earlier version: fields added since take their defaults.

    Raises:
      InputError: not JSON, or fields that this version does not have; names ``where``.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    return freeze(_filled(values, Config), where=where)


def _filled(values: Any, kind: Any) -> Any:
    if not isinstance(values, dict):
        return values
    result, hints = dict(values), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        if typing.get_origin(inner) in (Union, types.UnionType):
            section = result.get(field.name)
            inner = _by_name(typing.get_args(inner)).get(section.get("name", "") if isinstance(section, dict) else "")
        if dataclasses.is_dataclass(inner):
            result[field.name] = _filled(result.get(field.name, {}), inner)
        elif field.name not in result and field.default is not dataclasses.MISSING:
            result[field.name] = field.default
    return result
