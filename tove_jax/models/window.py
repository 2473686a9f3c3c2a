"""Encoders whose layers look at windows, with a few that look everywhere: cutting windows, running the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tove_jax.errors import InputError

WINDOWED, GLOBAL = "windowed", "global"


def partition(x: jax.Array, window: int) -> jax.Array:
    """Cuts a map into windows that do not overlap, padded with zeros at the right and bottom where needed.

    Args:
      x: (B, H, W, D).
      window: side of a window.

    Returns:
      (B * ceil(H / window) * ceil(W / window), window, window, D); a picture's windows follow each other, row by row.
    """
    batch, high, wide, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -high % window), (0, -wide % window), (0, 0)))
    down, across = x.shape[1] // window, x.shape[2] // window
    x = x.reshape(batch, down, window, across, window, width).swapaxes(2, 3)
    return x.reshape(batch * down * across, window, window, width)


def unpartition(windows: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Puts the windows of `partition` together again, and cuts the padding off.

    Args:
      windows: (B * number of windows, window, window, D).
      grid: (H, W) of the map.

    Returns:
      (B, H, W, D).
    """
    (high, wide), window = grid, windows.shape[1]
    down, across = -(-high // window), -(-wide // window)
    x = windows.reshape(-1, down, across, window, window, windows.shape[-1]).swapaxes(2, 3)
    return x.reshape(-1, down * window, across * window, windows.shape[-1])[:, :high, :wide]


class Run(NamedTuple):
    """Layers of one kind that follow each other.

    Attributes:
      kind: ``windowed`` or ``global``.
      start: index of the first among the layers of its kind.
      length: how many.
      wanted: index of the last among all layers, when its output is wanted; or None.
    """

    kind: str
    start: int
    length: int
    wanted: int | None


def layer_kinds(depth: int, global_layers: Iterable[int]) -> tuple[str, ...]:
    """Returns the kind of every layer.

    Raises:
      InputError: a global layer out of range.
    """
    everywhere = set(global_layers)
    if any(not 0 <= index < depth for index in everywhere):
        raise InputError(f"global layers: expected indices below {depth}, found {sorted(everywhere)}")
    return tuple(GLOBAL if index in everywhere else WINDOWED for index in range(depth))


def indices(kinds: Sequence[str], kind: str) -> tuple[int, ...]:
    """Returns the indices of the layers of one kind, in order: what its stack holds."""
    return tuple(index for index, found in enumerate(kinds) if found == kind)


def _runs(kinds: Sequence[str], wanted: frozenset[int]) -> list[Run]:
    """Cuts the layers where the kind changes and after every wanted one."""
    runs: list[Run] = []
    seen = {WINDOWED: 0, GLOBAL: 0}
    for index, kind in enumerate(kinds):
        if not runs or runs[-1].kind != kind or runs[-1].wanted is not None:
            runs.append(Run(kind, seen[kind], 0, None))
        runs[-1] = runs[-1]._replace(length=runs[-1].length + 1, wanted=index if index in wanted else None)
        seen[kind] += 1
    return runs


def _repeats(runs: Sequence[Run]) -> int:
    """Counts how often the first two runs come again, the first time included, with no output wanted."""

    def alike(index: int) -> bool:
        pair = [run._replace(start=0) for run in runs[index : index + 2]]
        return pair == [run._replace(start=0) for run in runs[:2]] and all(run.wanted is None for run in pair)

    count = 0
    while len(runs) >= 2 * count + 2 and alike(2 * count):
        count += 1
    return count


def run_layers(
    kinds: Sequence[str],
    stacks: Mapping[str, Any],
    bodies: Mapping[str, Callable[[Any, jax.Array], jax.Array]],
    x: jax.Array,
    wanted: Iterable[int] = (),
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """Runs windowed and global layers in their order, each kind compiled once where the order repeats.

    Layers of a kind are stacked; layers of one kind in a row are scanned, and so is a row of equal groups
    (SAM-L: four times five windowed layers and a global one).

    Args:
      kinds: of every layer, see `layer_kinds`.
      stacks: parameters by kind, every leaf with a leading axis over the layers of this kind, in order.
      bodies: ``(parameters of one layer, x) -> x`` by kind.
      x: input of the first layer.
      wanted: layers whose output is wanted.

    Returns:
      The output of the last layer, and the wanted outputs by layer.
    """

    def run_one(kind: str, params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, layer: (bodies[kind](layer, x), None), x, params)[0]

    def part(run: Run, count: int = 1) -> Any:
        """The run's layers, and those of the runs like it: (count, length, ...)."""
        stop = run.start + count * run.length
        return jax.tree.map(
            lambda leaf: leaf[run.start : stop].reshape(count, run.length, *leaf.shape[1:]), stacks[run.kind]
        )

    runs, found = _runs(kinds, frozenset(wanted)), {}
    while runs:
        first, count = runs[0], _repeats(runs)
        if count > 1:
            second = runs[1]

            def group(x: jax.Array, layers: Any, first: Run = first, second: Run = second) -> tuple[jax.Array, None]:
                return run_one(second.kind, layers[1], run_one(first.kind, layers[0], x)), None

            x, _ = jax.lax.scan(group, x, (part(first, count), part(second, count)))
            runs = runs[2 * count :]
            continue
        x = run_one(first.kind, jax.tree.map(lambda leaf: leaf[0], part(first)), x)
        if first.wanted is not None:
            found[first.wanted] = x
        runs = runs[1:]
    return x, found
