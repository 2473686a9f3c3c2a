"""A plain Python function as an expert: ``python:package.module:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tove_jax.config.specs import ForeignSpec
from tove_jax.errors import InputError
from tove_jax.experts import foreign
from tove_jax.experts.base import Expert
from tove_jax.files.weights import hash_file

Function = TypeVar("Function", bound=Callable[..., Any])


def expert(**settings: Any) -> Callable[[Function], Function]:
    """Returns a decorator that tells what pictures a function, or the model that it makes, takes.

    Args:
      **settings: see `tove_jax.experts.foreign.read_settings`; ``size`` must be there.

    Raises:
      InputError: settings that do not read.
    """
    foreign.read_settings(settings, "expert(...)")

    def mark(function: Function) -> Function:
        setattr(function, foreign.ATTRIBUTE, settings)
        return function

    return mark


def source_hash(function: Any, where: str) -> str:
    """Returns the sha256 of the file that defines a function.

    Raises:
      InputError: it has no source file.
    """
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        path = None
    if path is None or not Path(path).is_file():
        raise InputError(f"expert {where}: expected a function with a source file, by which changes of it are noticed")
    return hash_file(path)


def load(spec: ForeignSpec, *, weights: Path | None = None, size: int | None = None) -> Expert:
    """Makes an expert of the function that a spec names.

    The function takes pixels uint8 (B, S, S, 3), RGB, cut by its view and not normalised, and returns what
    `tove_jax.experts.foreign.to_features` takes, maps as (B, H, W, D). The hash is of the file that defines it,
    and of the settings' ``files``.

    Args:
      spec: with the function as source.
      weights: none are taken.
      size: pixels a side, where it is not that of the settings.

    Raises:
      InputError: no such function, no settings, or a result of another kind.
    """
    if weights is not None:
        raise InputError(f"expert {spec.name}: a function takes no weights, found {weights}")
    function = foreign.import_callable(spec.source, spec.name)
    settings = foreign.settings_of(function, spec.name).sized(size)
    digest = source_hash(function, spec.name)
    return foreign.make_expert(spec, settings, function, digest, raw=True, channels_first=False)
