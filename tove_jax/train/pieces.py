"""Arrays of a mesh as objects of a store: each process writes what it holds, and reads back what it needs.

Of every array each distinct shard is written once, by one of the processes that hold it, in turn. A process packs its
shards into objects (``parts``); an index says which part of which array lies where, with a CRC-32.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.errors import InputError
from tove_jax.files.bucket import THREADS, Bucket, all_at_once

PART_BYTES = 128 << 20
"""An object holds at least as much, if there is as much, and one shard more at most."""
# Parts up to here are read as a whole, and kept for the next shard of them.
_SMALL = 32 << 20

Region = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """A shard: name of its array, from where to where on each axis, and its values, on the host."""

    name: str
    region: Region
    values: np.ndarray


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns a tree's leaves by the path to each."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def own_pieces(leaves: Mapping[str, jax.Array]) -> list[Piece]:
    """Copies to the host what this process writes of some arrays; all processes call it with the same arrays."""
    chosen = []
    for number, (name, leaf) in enumerate(leaves.items()):
        holders: dict[Region, list[jax.Device]] = {}
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            holders.setdefault(_region(index, leaf.shape), []).append(device)
        here = {shard.device: shard.data for shard in leaf.addressable_shards}
        for region, devices in holders.items():
            data = here.get(devices[number % len(devices)])
            if data is not None:
                data.copy_to_host_async()
                chosen.append((name, region, data))
    # A copy, since the array behind it may be given away to the next step.
    return [Piece(name, region, np.array(data, copy=True)) for name, region, data in chosen]


def write_pieces(bucket: Bucket, stem: str, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Writes pieces as objects ``{stem}-{number}.part``; returns their index, JSON-ready."""
    packed: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if size >= PART_BYTES:
            packed.append([])
            size = 0
        packed[-1].append(piece)
        size += piece.values.nbytes
    names = [f"{stem}-{number:05d}.part" for number in range(len(packed))]

    def send(one: tuple[str, list[Piece]]) -> tuple[int, list[Any]]:
        name, held = one
        index, parts, offset = [], [], 0
        for piece in held:
            data = np.ascontiguousarray(piece.values).tobytes()
            index.append([piece.name, piece.region, name, offset, len(data), zlib.crc32(data)])
            parts.append(data)
            offset += len(data)
        bucket.write(name, b"".join(parts))
        return offset, index

    sent = all_at_once(send, [(name, held) for name, held in zip(names, packed, strict=True) if held])
    return {
        "objects": {name: size for name, (size, _) in zip(names, sent, strict=False)},
        "pieces": [entry for _, index in sent for entry in index],
    }


def describe(leaves: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Returns dtype and shape of every array, JSON-ready."""
    return {name: [jnp.dtype(leaf.dtype).name, list(leaf.shape)] for name, leaf in leaves.items()}


class Pieces:
    """Arrays that were written whole.

    Args:
      bucket: in which the objects lie.
      arrays: of `describe`.
      pieces: of `write_pieces`, of all processes.
      where: names the save in errors.

    Attributes:
      arrays: name -> dtype and shape.
    """

    def __init__(self, bucket: Bucket, arrays: Mapping[str, Any], pieces: Sequence[Any], where: str) -> None:
        self._bucket, self._where = bucket, where
        self.arrays = {name: (jnp.dtype(dtype), tuple(shape)) for name, (dtype, shape) in arrays.items()}
        self._pieces: dict[str, list[Any]] = {}
        ends: dict[str, int] = {}
        for name, region, part, offset, size, crc in pieces:
            region = tuple((start, stop) for start, stop in region)
            self._pieces.setdefault(name, []).append((region, part, offset, size, crc))
            ends[part] = max(ends.get(part, 0), offset + size)
        self._small = {part for part, end in ends.items() if end <= _SMALL}
        self._part = functools.lru_cache(2 * THREADS)(self._read_part)

    def region(self, name: str, region: Region) -> np.ndarray:
        """Reads a part of an array; only the pieces that lie in it.

        Raises:
          InputError: a piece is gone, cut short or damaged.
        """
        dtype, _ = self.arrays[name]
        result = np.empty([stop - start for start, stop in region], dtype)
        filled = 0
        for held, part, offset, size, crc in self._pieces.get(name, ()):
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(region, held, strict=True)]
            if any(start >= stop for start, stop in both):
                continue
            data = self._bytes(part, offset, size)
            if data is None or len(data) != size or zlib.crc32(data) != crc:
                found = "nothing" if data is None else f"{len(data)} bytes"
                raise InputError(
                    f"{self._where}: {name}: truncated or damaged: expected {size} bytes with CRC-32 {crc:08x} in "
                    f"{part}, found {found}" + ("" if data is None else f" with {zlib.crc32(data):08x}")
                )
            values = np.frombuffer(data, dtype).reshape([stop - start for start, stop in held])
            there = tuple(slice(c - a, d - a) for (a, _), (c, d) in zip(region, both, strict=True))
            here = tuple(slice(c - a, d - a) for (a, _), (c, d) in zip(held, both, strict=True))
            result[there] = values[here]
            filled += math.prod(stop - start for start, stop in both)
        if filled != result.size:
            raise InputError(f"{self._where}: {name}: damaged: {filled} of {result.size} values are there")
        return result

    def whole(self, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
        """Reads the wanted arrays, by name."""
        names = [name for name in self.arrays if wanted(name)]
        read = all_at_once(lambda name: self.region(name, tuple((0, n) for n in self.arrays[name][1])), names)
        return dict(zip(names, read, strict=True))

    def onto(self, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Reads arrays onto shardings: each process what its devices hold.

        Args:
          leaves: name -> array, or its shape, of the sharding wanted; they are among `arrays`, of the same shape.
        """

        def read(name: str) -> dict[Region, np.ndarray]:
            leaf = leaves[name]
            indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
            return {region: self.region(name, region) for region in {_region(i, leaf.shape) for i in indices}}

        result: dict[str, jax.Array] = {}
        with ThreadPoolExecutor(THREADS) as pool:
            for name, regions in zip(leaves, pool.map(read, leaves), strict=True):
                result[name] = _placed(leaves[name], regions)
        return result

    def _bytes(self, part: str, offset: int, size: int) -> bytes | None:
        if part not in self._small:
            return self._bucket.read(part, offset, offset + size)
        data = self._part(part)
        return None if data is None else data[offset : offset + size]

    def _read_part(self, part: str) -> bytes | None:
        return self._bucket.read(part)


def _placed(leaf: Any, regions: Mapping[Region, np.ndarray]) -> jax.Array:
    def part(index: Any) -> np.ndarray:
        return regions[_region(index, leaf.shape)].astype(leaf.dtype)

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def _region(index: Sequence[slice], shape: Sequence[int]) -> Region:
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
