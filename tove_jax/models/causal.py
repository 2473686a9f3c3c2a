"""What decoders that read from left to right share: rotary positions, masks, the store of past keys and values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.errors import InputError
from tove_jax.models.rotary import turn_halves
from tove_jax.models.stack import UNROLLED, Remat, Requests, parse, rematerialised, segments
from tove_jax.parallel import constrain

STORED = ("layers", "batch", "tokens", "kv_heads", None)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embeddings of text (RoFormer, arXiv:2104.09864); channel i pairs up with i + width / 2.

    Attributes:
      theta: the slowest pair turns by about 1 / theta a token.
      scaling: how a model reaches beyond the length it was trained at: ``none``; ``linear``: positions are
        divided by `factor` (arXiv:2306.15595); ``dynamic``: beyond `length` tokens theta grows with the longest
        row of the batch (NTK-aware); ``llama3``: slow pairs are divided by `factor`, fast ones left, those in
        between blended (Llama 3.1, arXiv:2407.21783).
      factor: of the scaling.
      low, high: of ``llama3``: pairs that turn less often than `low` times within `length` tokens are slow,
        those that turn more often than `high` times fast.
      length: of ``dynamic`` and ``llama3``, tokens that the model was trained at.
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "dynamic", "llama3"] = "none"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    length: int = 0

    def __post_init__(self) -> None:
        if self.scaling in ("dynamic", "llama3") and self.length < 1:
            raise InputError(
                f"rotary embedding: scaling '{self.scaling}' needs the trained length, found {self.length}"
            )

    def frequencies(self, width: int, positions: jax.Array) -> jax.Array:
        """Returns float32 (width / 2,), radians a token; `positions` matter to ``dynamic`` alone."""
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        if self.scaling == "dynamic":
            longest = jnp.maximum(positions.max() + 1, self.length).astype(jnp.float32)
            stretch = self.factor * longest / self.length - (self.factor - 1)
            return 1.0 / (self.theta * stretch ** (width / (width - 2))) ** exponents
        found = np.float32(1.0) / np.float32(self.theta) ** exponents
        if self.scaling == "linear":
            found = found / np.float32(self.factor)
        elif self.scaling == "llama3":
            turns = self.length * found / (2 * math.pi)
            share = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
            found = (1 - share) * found / self.factor + share * found
        return jnp.asarray(found, jnp.float32)

    def tables(self, width: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns cosines and sines, float32 (B, T, 1, width), of positions int (B, T)."""
        angles = positions[..., None].astype(jnp.float32) * self.frequencies(width, positions)
        angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
        return jnp.cos(angles), jnp.sin(angles)


def turn(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns queries or keys (B, T, heads, width) by `Rope.tables`; in float32, the dtype stays."""
    cos, sin = tables
    precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (precise * cos + turn_halves(precise) * sin).astype(x.dtype)


def row_positions(segments: jax.Array) -> jax.Array:
    """Returns every token's place in its own text, int32 (B, T), counting tokens that are not padding.

    Args:
      segments: bool or int (B, T); 0 is padding, a greater number than all before it begins a new text.
    """
    segments = segments.astype(jnp.int32)
    counted = jnp.cumsum(segments > 0, axis=1)
    highest = jax.lax.cummax(segments, axis=1)
    begins = segments > jnp.pad(highest, ((0, 0), (1, 0)))[:, :-1]
    before = jax.lax.cummax(jnp.where(begins, counted - 1, 0), axis=1)
    return jnp.maximum(counted - 1 - before, 0).astype(jnp.int32)


def visible(queries: jax.Array, keys: jax.Array, first: jax.Array | int = 0, window: int | None = None) -> jax.Array:
    """Returns which keys each query sees, bool (B, T, S): its own text, from its own place backwards.

    Args:
      queries: bool or int (B, T), the segments of the queries (see `row_positions`).
      keys: (B, S), those of the keys.
      first: place of the first query among the keys.
      window: keys that a query sees at most, its own place among them; None: all.
    """
    own = jnp.arange(queries.shape[1])[:, None] + first
    place = jnp.arange(keys.shape[1])[None, :]
    seen = place <= own
    if window is not None:
        seen &= place > own - window
    same = queries[:, :, None].astype(jnp.int32) == keys[:, None, :].astype(jnp.int32)
    return seen[None] & same & (keys[:, None, :] > 0)


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, of a size fixed when it is made.

    Attributes:
      keys: (L, B, size, key heads, head width), turned by their positions.
      values: the same.
      mask: bool (B, size), places that hold a token.
      used: int32 (), places in use, padding among them; a token beyond `size` has no place, the caller
        sees to that.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    used: jax.Array

    def take(self, rows: jax.Array) -> Cache:
        """Returns the rows with the given numbers, in that order; a row may come several times."""
        return self._replace(keys=self.keys[:, rows], values=self.values[:, rows], mask=self.mask[rows])


def make_cache(depth: int, batch: int, size: int, heads: int, width: int, dtype: Any) -> Cache:
    """Returns an empty store for `size` tokens a row; see `Cache`."""
    empty = constrain(jnp.zeros((depth, batch, size, heads, width), dtype), STORED)
    return Cache(empty, empty, jnp.zeros((batch, size), bool), jnp.zeros((), jnp.int32))


class Rows(NamedTuple):
    """Tokens about to be read, and how they lie behind those read before.

    Attributes:
      own: bool or int (B, T), their segments (see `row_positions`).
      keys: (B, S), those of everything that is kept, theirs among them.
      first: int32 (), place of the first of them.
      positions: int32 (B, T), places in the text, from 0.
    """

    own: jax.Array
    keys: jax.Array
    first: jax.Array
    positions: jax.Array

    def advance(self, cache: Cache) -> Cache:
        """Returns the cache with these tokens counted in."""
        return cache._replace(mask=self.keys, used=self.first + self.own.shape[1])


def place_rows(
    shape: tuple[int, int], mask: jax.Array | None, positions: jax.Array | None, cache: Cache | None
) -> Rows:
    """Places rows of `shape` (B, T); mask and positions as `tove_jax.models.llama.Llama` takes them."""
    own = jnp.ones(shape, bool) if mask is None else mask
    keys, first = own, jnp.zeros((), jnp.int32)
    if cache is not None:
        own, first = own.astype(bool), cache.used
        keys = jax.lax.dynamic_update_slice(cache.mask, own, (jnp.zeros((), jnp.int32), first))
    if positions is None:
        positions = row_positions(own)
        if cache is not None:
            positions += cache.mask.sum(axis=1, keepdims=True, dtype=jnp.int32)
    return Rows(own, keys, first, positions)


def check_rows(width: int, tokens: Any, embeddings: Any, mask: Any, cache: Cache | None) -> tuple[int, int]:
    """Refuses what a decoder of `width` cannot read, see `tove_jax.models.llama.Llama`; returns (B, T).

    Raises:
      InputError: both or neither of tokens and embeddings, or arrays that do not fit.
    """
    if (tokens is None) == (embeddings is None):
        raise InputError("language model: expected either tokens or embeddings")
    if tokens is not None and (tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer)):
        raise InputError(f"tokens: expected integers (batch, tokens), found {tokens.dtype} {tokens.shape}")
    if embeddings is not None and (embeddings.ndim != 3 or embeddings.shape[-1] != width):
        raise InputError(f"embeddings: expected (batch, tokens, {width}), found {embeddings.shape}")
    rows, length = (tokens if tokens is not None else embeddings).shape[:2]
    if mask is not None and mask.shape != (rows, length):
        raise InputError(f"mask: expected {(rows, length)}, found {mask.shape}")
    if cache is not None and (cache.mask.shape[0] != rows or cache.mask.shape[1] < length):
        raise InputError(f"cache: {cache.mask.shape} (batch, places) cannot take tokens {(rows, length)}")
    return rows, length


def parse_names(intermediates: Sequence[str], depth: int) -> Requests:
    """Sorts the names of a decoder's intermediates, see `tove_jax.models.llama.Llama`.

    Raises:
      InputError: an unknown name.
    """
    for name in intermediates:
        if "attention" in name:
            raise InputError(f"intermediate '{name}': expected embeddings, hidden or layers/<i>")
    return parse(intermediates, depth, ("embeddings", "hidden"))


class Memory(NamedTuple):
    """One layer's view of a cache.

    Attributes:
      keys, values: of all layers, as in `Cache`.
      layer: int32 (), which layer.
      used: int32 (), where the next token goes.
    """

    keys: jax.Array
    values: jax.Array
    layer: jax.Array
    used: jax.Array

    def extend(self, key: jax.Array, value: jax.Array) -> tuple[Memory, jax.Array, jax.Array]:
        """Stores (B, T, heads, width) each; returns the memory and the layer's (B, size, heads, width)."""
        zero = jnp.zeros((), jnp.int32)
        place = (self.layer, zero, self.used, zero, zero)

        def put(whole: jax.Array, new: jax.Array) -> jax.Array:
            return constrain(jax.lax.dynamic_update_slice(whole, new[None].astype(whole.dtype), place), STORED)

        memory = self._replace(keys=put(self.keys, key), values=put(self.values, value))
        own = [jax.lax.dynamic_index_in_dim(whole, self.layer, keepdims=False) for whole in memory[:2]]
        return memory, own[0].astype(key.dtype), own[1].astype(value.dtype)


def run_layers(
    block: nn.Module,
    stacked: Any,
    x: jax.Array,
    asked: Requests,
    *,
    data: Any = None,
    cache: Cache | None = None,
    beside: Mapping[str, Any] | None = None,
    remat: Remat = "none",
    output_wanted: bool = True,
    call: Callable[[Any], Sequence[Any]] = lambda data: (),
) -> tuple[jax.Array, dict[str, jax.Array], Cache | None]:
    """Runs stacked layers, scanned; those that nothing asked for depends on are left out.

    Args:
      block: one layer without a parent, ``(x, memory, *call(data of the layer)) -> (x, memory)``.
      stacked: the layers' parameters, every leaf with a leading axis over layers.
      x: input of the first layer.
      asked: outputs of layers that are wanted.
      data: pytree with a leading axis over layers.
      cache: is read and extended; `mask` and `used` are the caller's.
      beside: further collections of the layers' variables by name, stacked as `stacked` is.
      remat: see `tove_jax.models.vit.VisionTransformer`.
      output_wanted: whether the last layer's output is wanted.
      call: what each layer is called with.

    Returns:
      The output of the last layer run, what was asked for by name, and the cache.
    """
    depth = jax.tree.leaves(stacked)[0].shape[0]
    found: dict[str, jax.Array] = {}
    numbers = jnp.arange(depth, dtype=jnp.int32)
    variables = {"params": stacked, **(beside or {})}
    carry: Any = (x, None if cache is None else (cache.keys, cache.values))

    def body(carry: Any, layer: Any) -> tuple[Any, None]:
        variables, number, own = layer
        x, stored = carry
        memory = None if stored is None or cache is None else Memory(stored[0], stored[1], number, cache.used)
        result: Any = block.apply(variables, x, memory, *call(own))
        x, memory = result
        return (x, None if memory is None else memory[:2]), None

    for start, stop in segments(asked, depth, output_wanted or cache is not None):
        part = jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], (variables, numbers, data))
        unroll = stop - start <= UNROLLED
        run = rematerialised(body, remat, prevent_cse=unroll)
        if stop - start > 1:
            carry, _ = jax.lax.scan(run, carry, part, unroll=unroll)
        else:
            carry, _ = run(carry, jax.tree.map(lambda leaf: leaf[0], part))
        found.update(dict.fromkeys(asked.outputs.get(stop - 1, ()), carry[0]))
    if cache is not None:
        cache = cache._replace(keys=carry[1][0], values=carry[1][1])
    return carry[0], found, cache
