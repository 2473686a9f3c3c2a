"""Encoders whose layers look at windows, with a few that look everywhere: their embedding, order and stacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.errors import InputError
from tove_jax.models import block as shared
from tove_jax.models.attention import Implementation
from tove_jax.models.block import Block, PatchEmbed, stacked_init
from tove_jax.models.position import resize_map
from tove_jax.models.rotary import Rotary
from tove_jax.models.stack import parse

WINDOWED, GLOBAL = "windowed", "global"
KINDS = (WINDOWED, GLOBAL)

# Under any prefix; families add their own.
LOGICAL_AXES = (
    *((pattern.replace("layers/", "layers/(windowed|global)/"), axes) for pattern, axes in shared.LOGICAL_AXES),
    (r"(.*/)?layers/(windowed|global)/attention/position/(rows|columns)", ("layers", None, None)),
)


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


class WindowedEncoder(nn.Module):
    """What the windowed encoders share; a family gives its blocks and what comes before and after the layers.

    Parameters: ``patch_embed/{kernel (p, p, 3, D), bias (D,)}``, and under ``layers/{windowed,global}/`` those of
    `tove_jax.models.block.Block`, stacked on a leading axis over the layers of that kind, in order.

    Attributes:
      grid: patches a side that the parameters were trained for; another input resizes position embeddings.
      width: D.
      depth: number of layers.
      heads: attention heads; divides the width.
      mlp_width: F.
      global_layers: indices of the layers that look everywhere.
      window: side of the others' windows, patches.
      patch_size: side of a patch, pixels.
      norm_epsilon: of every norm.
      dtype: compute dtype; norm statistics and softmax are float32 at the least.
      attention: see `tove_jax.models.attention.choose`.
    """

    grid: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    global_layers: tuple[int, ...]
    window: int
    patch_size: int = 16
    norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32
    attention: Implementation = "auto"

    def block(self, kind: str, grid: tuple[int, int]) -> tuple[Block, Rotary | None]:
        """Returns an unbound layer of one kind, and the rotary tables of the places it looks at.

        Args:
          kind: ``windowed`` or ``global``.
          grid: rows and columns of what it looks at: the window or the map.
        """
        raise NotImplementedError

    def embed(self, pixels: jax.Array) -> jax.Array:
        """Returns the patches (B, H / p, W / p, D) of normalised pixels (B, H, W, 3), without positions.

        Raises:
          InputError: pixels of another number of dimensions or channels, or sides that are no multiples of p.
        """
        side = self.patch_size
        if pixels.ndim != 4 or pixels.shape[3] != 3 or any(n < side or n % side for n in pixels.shape[1:3]):
            raise InputError(
                f"pixels: expected (batch, height, width, 3) with sides that are multiples of {side}, "
                f"found {pixels.shape}"
            )
        return PatchEmbed(side, self.width, bias=True, dtype=self.dtype, name="patch_embed")(pixels)

    def place(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """Adds position embeddings (grid, grid, D) to a map (B, H, W, D), resized where the grids differ."""
        return x + resize_map(table, (x.shape[1], x.shape[2])).astype(self.dtype)

    def run(self, x: jax.Array, intermediates: Sequence[str]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs the layers on a map (B, H, W, D).

        Args:
          x: input of the first layer.
          intermediates: names among ``embeddings``, `x` itself, and ``layers/{i}``, the output of layer i, negative
            counting from the end.

        Returns:
          The last layer's output, and a dict with exactly the names asked for, all (B, H, W, D).

        Raises:
          InputError: an unknown name, or a layer out of range.
        """
        asked = parse(intermediates, self.depth, ("embeddings",))
        if asked.rows:
            raise InputError("attention_cls: the encoder has no class token")
        kinds = layer_kinds(self.depth, self.global_layers)
        high, wide = x.shape[1:3]
        grids = {WINDOWED: (self.window, self.window), GLOBAL: (high, wide)}
        blocks = {kind: self.block(kind, grids[kind]) for kind in KINDS if kind in kinds}

        def initial(rng: jax.Array) -> dict[str, Any]:
            # One place is enough: no parameter's shape depends on the map.
            example = jnp.zeros((1, 1, 1, self.width), jnp.float32)
            keys = dict(zip(KINDS, jax.random.split(rng), strict=True))
            layers = {kind: self.block(kind, grids[kind] if kind == WINDOWED else (1, 1))[0] for kind in blocks}
            return {kind: stacked_init(layer, kinds.count(kind), example)(keys[kind]) for kind, layer in layers.items()}

        def body(kind: str) -> Callable[[Any, jax.Array], jax.Array]:
            block, rotary = blocks[kind]
            return lambda params, x: block.apply({"params": params}, x, rotary=rotary)[0]

        stacks = self.param("layers", initial)
        last, outputs = run_layers(kinds, stacks, {kind: body(kind) for kind in blocks}, x, asked.outputs)
        found = {"embeddings": x}
        for layer, names in asked.outputs.items():
            found.update(dict.fromkeys(names, outputs[layer]))
        return last, {name: found[name] for name in intermediates}
