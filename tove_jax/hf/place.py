"""Published arrays straight onto the devices, and back into files, one array at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from tove_jax.errors import InputError, nearest
from tove_jax.files.slices import Pending, Readable
from tove_jax.hf.rules import Rule, check, flatten, unflatten
from tove_jax.parallel import logical_specs, tree_shardings

_SMALL = 1 << 18  # bytes


def place_arrays(
    tree: Any,
    arrays: Mapping[str, Readable],
    rules: Sequence[Rule],
    axes: Iterable[tuple[str, tuple[str | None, ...]]],
    *,
    mesh: Mesh | None = None,
    store: Any = None,
    ignore: Iterable[str] = (),
    source: str = "arrays",
) -> dict[str, Any]:
    """Reads a parameter tree out of indexed files, a part of an array at a time.

    Args:
      tree: the wanted tree, of shapes.
      arrays: every published array.
      rules: published names <-> tree.
      axes: first-match rules from paths to logical axis names.
      mesh: where the parameters go; None: the first device.
      store: their dtype; None: that of the file.
      ignore: see `tove_jax.hf.rules.check`.
      source: what the arrays came from, for messages.

    Raises:
      InputError: arrays that are missing, unknown, of another shape or no floating point, all named.
    """
    leaves = flatten(tree)
    by_path = check(arrays, rules, {path: leaf.shape for path, leaf in leaves.items()}, ignore=ignore, source=source)
    if mesh is None:
        shardings: dict[str, Sharding] = dict.fromkeys(leaves, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        shardings = flatten(tree_shardings(tree, logical_specs(tree, axes, "logical axes"), mesh))
    placed = {}
    for path, leaf in leaves.items():
        rule = by_path[path]
        names = list(rule.names(leaf.shape))
        dtype = np.dtype(store or arrays[names[0]].dtype)
        wrong = next((name for name in names if arrays[name].dtype.kind not in "fV"), None)  # V: bfloat16, float8
        if wrong is not None:
            raise InputError(f"{source}: {wrong} has dtype {arrays[wrong].dtype}, expected floating point")
        if not rule.placeholders:
            placed[path] = _place(arrays[names[0]], rule.axes, leaf.shape, dtype, shardings[path])
        elif len(rule.placeholders) == 1 and leaf.size * dtype.itemsize > _SMALL:
            placed[path] = _place_layers([arrays[n] for n in names], rule, leaf.shape, dtype, shardings[path])
        else:  # small, and so are experts within layers: put together on the host, which needs no compilation
            whole = np.stack([arrays[name].read() for name in names]).reshape(rule.stacked_shape(leaf.shape))
            content = rule.to_leaf(whole).astype(dtype)
            placed[path] = jax.make_array_from_callback(leaf.shape, shardings[path], content.__getitem__)
    return unflatten(placed)


def _reader(
    stored: Readable, axes: tuple[int, ...] | None, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[Any], np.ndarray]:
    """Returns a function from slices of our array to its content; devices that hold the same share one reading."""
    held: dict[Any, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if key not in held:
            out = held[key] = np.empty([stop - start for start, stop, _ in key], dtype)
            if axes is None:
                stored.read(index, out=out)
            else:
                back = np.argsort(axes)
                stored.read([index[axis] for axis in back], out=out.transpose(back))
        return held[key]

    return read


def _place(
    stored: Readable, axes: tuple[int, ...] | None, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding
) -> jax.Array:
    return jax.make_array_from_callback(shape, sharding, _reader(stored, axes, shape, dtype))


def _place_layers(
    layers: Sequence[Readable], rule: Rule, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding
) -> jax.Array:
    """Fills a stacked leaf on the devices layer by layer; the leading axis is never split."""
    single = sharding
    if isinstance(sharding, NamedSharding):
        single = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    axes = None if rule.axes is None else tuple(axis - 1 for axis in rule.axes[1:])
    whole = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    put = _putter(sharding)
    for number, stored in enumerate(layers):
        layer = _place(stored, axes, shape[1:], dtype, single)
        # Waiting keeps no more than one layer's array in the host's memory.
        whole = jax.block_until_ready(put(whole, layer, np.int32(number)))
    return whole


@functools.lru_cache(maxsize=64)
def _putter(sharding: Sharding) -> Callable[..., jax.Array]:
    def put(whole: jax.Array, layer: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(whole, layer, number, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def pending_arrays(params: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, Pending]:
    """Returns every published array of a parameter tree, to be fetched from the devices when it is written.

    Args:
      params: the tree.
      rules: published names <-> tree, without parts.

    Raises:
      InputError: a parameter without a published name.
    """
    by_path = {rule.path: rule for rule in rules}
    found: dict[str, Pending] = {}
    for path, leaf in flatten(params).items():
        if path not in by_path:
            raise InputError(f"parameters: no published name for {path}{nearest(path, by_path)}")
        rule = by_path[path]
        for name, index in rule.names(leaf.shape).items():

            def get(leaf: Any = leaf, index: tuple[int, ...] = index, rule: Rule = rule) -> np.ndarray:
                lead = len(rule.placeholders)
                if rule.axes is None:
                    return _fetch(leaf[index] if index else leaf)
                # Our axes in the published order: those of the placeholders are indexed, the others permuted.
                order = [int(axis) for axis in np.argsort(rule.axes)]
                place: list[Any] = [slice(None)] * leaf.ndim
                for axis, number in zip(order[:lead], index, strict=True):
                    place[axis] = number
                array = _fetch(leaf[tuple(place)])
                kept = [axis for axis in range(leaf.ndim) if axis not in order[:lead]]
                return np.ascontiguousarray(array.transpose([kept.index(axis) for axis in order[lead:]]))

            found[name] = Pending(np.dtype(leaf.dtype), rule.published_shape(leaf.shape), get)
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[Any, ...]:
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))


def _fetch(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
