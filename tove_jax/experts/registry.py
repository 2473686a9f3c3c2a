"""The table of known experts, and how to load one by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tove_jax.config import specs
from tove_jax.errors import InputError, nearest
from tove_jax.experts import (
    clip,
    convnext,
    depth,
    edges,
    efficientnet_lite,
    eva02,
    function,
    hed,
    normals,
    onnx_model,
    pix2struct,
    pp_ocr,
    sam,
    torch_model,
    vit,
)
from tove_jax.experts.base import Expert, ExpertCard
from tove_jax.experts.published import Published

# Modules with `ROWS`, one line each.
FAMILIES: tuple[ModuleType, ...] = (vit, convnext, pix2struct, eva02, sam, depth, edges, normals)

# Experts outside the table, by the kind of their spec (`tove_jax.config.specs`).
_FOREIGN: dict[str, ModuleType] = {"torch": torch_model, "onnx": onnx_model, "python": function}


class Entry(NamedTuple):
    """One registered expert.

    Attributes:
      card: what is known without loading, as published.
      loader: ``loader(*, weights: Path | None, **options) -> Expert``.
      describe: the same arguments, the card of the expert that `loader` would give.
    """

    card: ExpertCard
    loader: Callable[..., Expert]
    describe: Callable[..., ExpertCard]


def entry(row: Published) -> Entry:
    """Returns the entry of one published expert."""
    return Entry(row.card, row.load, row.describe)


def _collect() -> dict[str, Entry]:
    entries = [Entry(module.CARD, module.load, module.describe) for module in (clip, efficientnet_lite, hed, pp_ocr)]
    entries += [entry(row) for family in FAMILIES for row in family.ROWS]
    found = {known.card.name: known for known in entries}
    if len(found) != len(entries):
        names = [known.card.name for known in entries]
        raise ValueError(f"two experts are called {sorted({name for name in names if names.count(name) > 1})}")
    return found


_ENTRIES: dict[str, Entry] = _collect()


def register(
    card: ExpertCard, loader: Callable[..., Expert], describe: Callable[..., ExpertCard] | None = None
) -> None:
    """Makes a new expert known by ``card.name``.

    Args:
      card: its card.
      loader: called as ``loader(weights=path or None, **options)``; its keyword arguments are the
        options that `load` accepts, `size` among them when the name may carry one.
      describe: the same arguments, returns the card of the expert as it would be loaded; None:
        always `card`.

    Raises:
      InputError: the name is taken, or is no valid folder name.
    """
    _check_name(card.name)
    if card.name in _ENTRIES:
        raise InputError(f"expert {card.name}: this name is already registered")
    _ENTRIES[card.name] = Entry(card, loader, describe or (lambda *, weights=None, **options: card))


def cards() -> dict[str, ExpertCard]:
    """Returns every registered expert's published card, by name, without loading anything."""
    return {name: entry.card for name, entry in _ENTRIES.items()}


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Splits ``name``, ``name:size`` or ``[name=]kind:source[:size]`` into the name and load options.

    Raises:
      InputError: the name is unknown (the nearest known one is given), the size no number, or the name of an
        expert outside the table no valid one.
    """
    own = specs.foreign(spec)
    if own is not None:
        _check_name(own.name)
        if own.name in _ENTRIES:
            raise InputError(f"expert {spec!r}: the name {own.name!r} is a registered expert's; choose another")
        return own.name, {} if own.size is None else {"size": own.size}
    name, colon, size = spec.partition(":")
    if name not in _ENTRIES:
        known = ", ".join(_ENTRIES)
        raise InputError(f"unknown expert '{name}'{nearest(name, _ENTRIES)}; known: {known}")
    if not colon:
        return name, {}
    if not (size.isascii() and size.isdigit()):
        raise InputError(f"expert '{spec}': expected name or name:size, the size in pixels, found size {size!r}")
    return name, {"size": int(size)}


def takes(spec: str, option: str) -> bool:
    """Whether an expert's loader offers an option, such as ``dtype``; False for an unknown expert."""
    loader = _loader(spec)
    return loader is not None and option in inspect.signature(loader).parameters


def describe(spec: str, *, weights: Path | str | None = None, **options: Any) -> ExpertCard:
    """Returns the card of the expert that `load` would give, without reading its weights.

    Same arguments and errors as `load`. The `clip` expert's card needs `weights`: its folder's
    small configuration files are read. An expert outside the table is loaded, for its card.
    """
    _, describe, options = _resolve(spec, options)
    return describe(weights=Path(weights) if weights else None, **options)


def load(spec: str, *, weights: Path | str | None = None, **options: Any) -> Expert:
    """Loads an expert.

    Args:
      spec: registered name, or ``name:size`` for another input size than the published one
        (``hed:112``); or ``[name=]kind:source[:size]``, kinds ``torch``, ``onnx`` and ``python``
        (`tove_jax.experts.torch_model`, `tove_jax.experts.onnx_model`, `tove_jax.experts.function`).
      weights: file or folder of the weights; None finds the published ones in their installed
        package. The `clip` expert has none of its own and needs a CLIP folder.
      **options: the loader's own, see its module: `size`, `threads`, `feature`.

    Returns:
      The expert; its card describes it as loaded, with this size.

    Raises:
      InputError: unknown name or option, missing package, or weights that do not fit.
    """
    loader, _, options = _resolve(spec, options)
    return loader(weights=Path(weights) if weights else None, **options)


def _loader(spec: str) -> Callable[..., Expert] | None:
    own = specs.foreign(spec)
    if own is not None:
        return functools.partial(_FOREIGN[own.kind].load, own)
    entry = _ENTRIES.get(spec.partition(":")[0])
    return None if entry is None else entry.loader


def _check_name(name: str) -> None:
    if not name.isascii() or not name.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"expert name: expected letters, digits, '_' and '-', found {name!r}")


def _resolve(
    spec: str, options: dict[str, Any]
) -> tuple[Callable[..., Expert], Callable[..., ExpertCard], dict[str, Any]]:
    name, parsed = parse(spec)
    if parsed.keys() & options.keys():
        raise InputError(f"expert '{spec}': the size is given twice")
    loader = _loader(spec)
    assert loader is not None  # parse knows the name
    options = {**parsed, **options}
    parameters = inspect.signature(loader).parameters
    known = [key for key, value in parameters.items() if value.kind is not value.VAR_KEYWORD and key != "weights"]
    if len(known) + ("weights" in parameters) == len(parameters):
        for option in options:
            if option not in known:
                hint = f"{nearest(option, known)}; known: {', '.join(known)}"
                raise InputError(f"expert {name}: unknown option '{option}'{hint}")
    if name in _ENTRIES:
        return loader, _ENTRIES[name].describe, options
    # Only the model itself knows its shapes.
    return loader, lambda **given: loader(**given).card, options
