"""One table an architecture, read in both directions: published array names <-> our parameter tree.

A rule pairs a published name with a path in our tree. Indices in the name are placeholders (``{layer}``,
``{expert}``): the arrays they count are stacked on leading axes, in the order of the placeholders, and
the result is brought to our layout by a permutation of axes. Some arrays are published fused (query, key
and value in one): then several rules bear one name, each for its part. Nothing of this loses anything, so
each rule works in both directions and a round trip is exact to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tove_jax.errors import InputError, nearest

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_LISTED = 8
_STRIP = 64  # rows


@dataclasses.dataclass(frozen=True)
class Rule:
    """One published name (or a family of them) and the leaf that holds it.

    Attributes:
      name: published name; ``{word}`` stands for an index.
      path: our path, joined by ``/``.
      axes: permutation from (placeholders..., published axes...) to our axes; None keeps them.
      part: (i, n) where the leaf is the i-th of n equal parts, along its first axis (after the axes that
        `lead` counts), of the published array; the other parts have rules of their own under the same name.
      layers: the published indices that the first placeholder runs through, in the order of the stacked axis;
        None: 0, 1, 2, ... Several rules may share a name when their indices differ.
      lead: leading axes of length 1 that the published array has and the leaf lacks; `axes` does not count them.
    """

    name: str
    path: str
    axes: tuple[int, ...] | None = None
    part: tuple[int, int] | None = None
    layers: tuple[int, ...] | None = None
    lead: int = 0

    @functools.cached_property
    def placeholders(self) -> tuple[str, ...]:
        """Names of the indices, in the order of the stacked axes."""
        return tuple(_PLACEHOLDER.findall(self.name))

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Regular expression of the names; indices have no leading zero."""
        parts = _PLACEHOLDER.split(self.name)
        return re.compile("".join(r"(0|[1-9]\d*)" if i % 2 else re.escape(p) for i, p in enumerate(parts)))

    def stacked_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape (indices..., published axes...) of a leaf of our `shape`."""
        if self.axes is None:
            return tuple(shape)
        stacked = [0] * len(shape)
        for ours, theirs in enumerate(self.axes):
            stacked[theirs] = shape[ours]
        return tuple(stacked)

    def names(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Returns every published name behind a leaf of our `shape`, with its indices."""
        counts = self.stacked_shape(shape)[: len(self.placeholders)]
        if self.layers is not None and len(self.layers) != counts[0]:
            raise ValueError(f"{self.name}: the rule names {len(self.layers)} layers, {self.path} holds {counts[0]}")
        found = {}
        index: tuple[int, ...]
        for index in itertools.product(*map(range, counts)):
            published = index if self.layers is None else (self.layers[index[0]], *index[1:])
            found[self.name.format(**dict(zip(self.placeholders, published, strict=True)))] = index
        return found

    def published_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of each published array behind a leaf of our `shape`."""
        single = self.stacked_shape(shape)[len(self.placeholders) :]
        if self.part is not None:
            single = (single[0] * self.part[1], *single[1:])
        return (1,) * self.lead + single

    def take(self, array: np.ndarray) -> np.ndarray:
        """Returns what of one published array belongs to the leaf."""
        array = array.reshape(array.shape[self.lead :])
        if self.part is None:
            return array
        index, count = self.part
        size = len(array) // count
        return array[index * size : (index + 1) * size]

    def to_leaf(self, stacked: np.ndarray) -> np.ndarray:
        """Permutes a stacked array to our layout, contiguous."""
        return np.asarray(stacked if self.axes is None else stacked.transpose(self.axes), order="C")

    def to_stacked(self, leaf: np.ndarray) -> np.ndarray:
        """Permutes one of our leaves back to (indices..., published axes...)."""
        return leaf if self.axes is None else leaf.transpose(np.argsort(self.axes))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested mappings by path, joined by ``/``, in sorted order."""
    leaves: dict[str, Any] = {}
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, Mapping):
            leaves.update(flatten(value, f"{prefix}{key}/"))
        else:
            leaves[prefix + key] = value
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dictionaries from paths joined by ``/``."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree


def to_tree(
    arrays: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    ignore: Iterable[str] = (),
    source: str = "arrays",
) -> dict[str, Any]:
    """Brings published arrays into our parameter tree.

    Args:
      arrays: published name to array.
      rules: the architecture's table.
      shapes: every path of the wanted tree with its shape; rules for other paths are not used.
      ignore: regular expressions of published names that are left out on purpose.
      source: what the arrays came from, for messages.

    Returns:
      Nested dictionaries of arrays, dtypes as published.

    Raises:
      InputError: a published name is missing, not known, or of another shape; all of them are listed.
      ValueError: the table does not cover the wanted tree, or a published array in part only (faults of the
        table).
    """
    by_path = check(arrays, rules, shapes, ignore=ignore, source=source)
    leaves = {}
    for path, shape in shapes.items():
        rule = by_path[path]
        parts = {index: rule.take(np.asarray(arrays[name])) for name, index in rule.names(shape).items()}
        if not rule.placeholders:
            leaves[path] = rule.to_leaf(parts[()])
            continue
        leaves[path] = np.empty(shape, np.result_type(*parts.values()))
        stacked = rule.to_stacked(leaves[path])
        for index, part in parts.items():
            _copy(stacked[index], part)
    return unflatten(leaves)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies strip by strip: of a transposed matrix both sides then stay in the processor's cache, four times as fast."""
    if source.ndim < 2:
        target[...] = source
        return
    for first in range(0, len(source), _STRIP):
        target[first : first + _STRIP] = source[first : first + _STRIP]


def check(
    arrays: Mapping[str, Any],
    rules: Sequence[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    ignore: Iterable[str] = (),
    source: str = "arrays",
) -> dict[str, Rule]:
    """Refuses arrays that do not make up the wanted tree; arguments and errors are those of `to_tree`.

    Args:
      arrays: anything with a ``shape``; nothing else is looked at.
      rules, shapes, ignore, source: see `to_tree`.

    Returns:
      The rule of every path.
    """
    by_path = _by_path(rules, shapes)
    expected: dict[str, tuple[int, ...]] = {}
    held: dict[str, list[tuple[int, int] | None]] = {}
    for path, shape in shapes.items():
        rule = by_path[path]
        single = rule.published_shape(shape)
        for name in rule.names(shape):
            if expected.setdefault(name, single) != single:
                raise ValueError(f"{name}: its rules disagree on the shape, {expected[name]} and {single}")
            held.setdefault(name, []).append(rule.part)
    _check_parts(held)
    match_shapes(arrays, expected, f"{source}: weights do not fit the model", ignore=ignore)
    return by_path


def to_arrays(tree: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Brings our parameter tree to published names.

    Args:
      tree: nested dictionaries of arrays, or leaves by path.
      rules: the architecture's table; rules whose path the tree lacks are not used.

    Returns:
      Published name to contiguous array, dtypes as in the tree.

    Raises:
      InputError: a leaf that no rule covers.
      ValueError: two rules for one path or one published part, or a part without a leaf (faults of the table).
    """
    leaves = flatten(tree)
    known = {rule.path for rule in rules}
    strangers = [path for path in leaves if path not in known]
    if strangers:
        listed = ", ".join(f"{path}{nearest(path, known)}" for path in strangers[:_LISTED])
        raise InputError(f"parameters: no published name for {len(strangers)} of them: {listed}")
    by_path = _by_path(rules, leaves)
    leads: dict[str, int] = {}
    pieces: dict[str, dict[tuple[int, int] | None, np.ndarray]] = {}
    for path, leaf in leaves.items():
        rule, leaf = by_path[path], np.asarray(leaf)
        if leaf.ndim < len(rule.placeholders) or (rule.axes is not None and leaf.ndim != len(rule.axes)):
            raise InputError(f"parameters: {path} has shape {leaf.shape}, which {rule.name} cannot hold")
        stacked = rule.to_stacked(leaf)
        for name, index in rule.names(leaf.shape).items():
            if rule.part in pieces.setdefault(name, {}):
                raise ValueError(f"two rules give {name}")
            pieces[name][rule.part] = stacked[index].reshape((1,) * rule.lead + stacked[index].shape)
            leads[name] = rule.lead
    _check_parts(pieces)
    return {
        name: np.array(parts[None], order="C")
        if None in parts
        else np.concatenate([parts[part] for part in sorted(parts, key=_first)], axis=leads[name])
        for name, parts in pieces.items()
    }


def _by_path(rules: Sequence[Rule], paths: Iterable[str]) -> dict[str, Rule]:
    by_path: dict[str, Rule] = {}
    for rule in rules:
        if rule.path in by_path:
            raise ValueError(f"two rules for {rule.path}")
        by_path[rule.path] = rule
    uncovered = [path for path in paths if path not in by_path]
    if uncovered:
        raise ValueError(f"no rule for {uncovered}")
    return by_path


def _first(part: tuple[int, int] | None) -> int:
    return part[0] if part else 0


def _check_parts(held: Mapping[str, Iterable[tuple[int, int] | None]]) -> None:
    for name, parts in held.items():
        parts = list(parts)
        wanted = [(i, parts[0][1]) for i in range(parts[0][1])] if parts[0] is not None else [None]
        if sorted(parts, key=_first) != wanted:
            raise ValueError(f"{name}: its rules give the parts {parts}, expected {wanted}")


def match_shapes(
    arrays: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], complaint: str, *, ignore: Iterable[str] = ()
) -> None:
    """Refuses arrays that are not exactly the expected ones.

    Args:
      arrays: name to anything with a ``shape``.
      expected: name to shape.
      complaint: what the error begins with.
      ignore: regular expressions of names that may be there too.

    Raises:
      InputError: names that are missing, not known, or of another shape; all of them are listed, up to a limit.
    """
    skip = [re.compile(pattern) for pattern in ignore]
    extra = [n for n in arrays if n not in expected and not any(pattern.fullmatch(n) for pattern in skip)]
    missing = [name for name in expected if name not in arrays]
    wrong = [name for name in expected if name in arrays and arrays[name].shape != expected[name]]

    def listed(names: list[str], describe: Any) -> str:
        more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        return ", ".join(describe(name) for name in sorted(names)[:_LISTED]) + more

    problems = []
    if missing:
        text = listed(missing, lambda n: f"{n} {expected[n]}{nearest(n, extra)}")
        problems.append(f"{len(missing)} missing: {text}")
    if extra:
        text = listed(extra, lambda n: f"{n} {arrays[n].shape}{nearest(n, missing or expected)}")
        problems.append(f"{len(extra)} not known: {text}")
    if wrong:
        text = listed(wrong, lambda n: f"{n} found {arrays[n].shape}, expected {expected[n]}")
        problems.append(f"{len(wrong)} of another shape: {text}")
    if problems:
        raise InputError(f"{complaint}; " + "; ".join(problems))
