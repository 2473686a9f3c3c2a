"""First-match regular-expression rules over parameter paths: the one rule engine.

Trainable groups, learning rates, storage types and sharding are all tables of
``(pattern, value)`` that must cover every leaf of a tree (after big_vision's habit).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from tove_jax.errors import InputError

Value = TypeVar("Value")


def path_name(path: Sequence[Any]) -> str:
    """Returns a pytree key path as ``a/b/c``."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def flat_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns ``{path: leaf}`` in the tree's own order."""
    return {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def map_paths(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps ``function(path, leaf, ...)`` over a tree."""
    return jax.tree_util.tree_map_with_path(lambda p, *leaves: function(path_name(p), *leaves), tree, *rest)


def first_match(rules: Iterable[tuple[str, Value]], paths: Iterable[str], what: str) -> dict[str, Value]:
    """Gives every path the value of the first rule whose pattern matches it whole.

    Args:
      rules: ``(regular expression, value)`` in order.
      paths: parameter paths, joined by ``/``.
      what: name of the table, for the error.

    Returns:
      ``{path: value}``.

    Raises:
      InputError: a path that no rule covers (all are listed), or a pattern that is not a regular
        expression.
    """
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise InputError(f"{what}: {pattern!r} is not a regular expression: {error}") from None
    found: dict[str, Value] = {}
    missing = []
    for path in paths:
        for expression, value in compiled:
            if expression.fullmatch(path):
                found[path] = value
                break
        else:
            missing.append(path)
    if missing:
        raise InputError(f"{what}: no rule covers {len(missing)} parameters: " + ", ".join(missing[:20]))
    return found


def logical_specs(tree: Any, table: Iterable[tuple[str, tuple[str | None, ...]]], what: str) -> Any:
    """Gives every leaf its logical axis names, checked against its number of dimensions.

    Args:
      tree: arrays or shapes.
      table: ``(pattern, names)``; a name is None where a dimension is never sharded.
      what: name of the table, for errors.

    Returns:
      The tree with a tuple of names in place of each leaf.

    Raises:
      InputError: an uncovered leaf, or names that do not fit its dimensions.
    """
    names = first_match(table, flat_paths(tree), what)

    def check(path: str, leaf: Any) -> tuple[str | None, ...]:
        if len(names[path]) != np.ndim(leaf):
            raise InputError(f"{what}: {path} has shape {np.shape(leaf)} but axes {names[path]}")
        return names[path]

    return map_paths(check, tree)
