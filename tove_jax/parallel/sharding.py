"""From logical axes to shardings of whole trees, and the check that nothing big is replicated."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tove_jax.errors import InputError
from tove_jax.parallel.mesh import AXIS_RULES, BATCH_AXES, partition_spec
from tove_jax.parallel.rules import flat_paths


def tree_shardings(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """Returns a NamedSharding for every leaf.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`.
      specs: the same tree with tuples of logical axis names (see `logical_specs`).
      mesh: the device mesh.
    """
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, AXIS_RULES)), tree, specs
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of something every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


@functools.lru_cache(8)
def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Tells which of how many equal shares of a batch's rows this process's devices hold.

    Processes over which only ``tensor`` is split hold the same rows, so there can be fewer shares than processes.

    Args:
      mesh: the device mesh.

    Returns:
      The number of the share, from 0, and how many there are.

    Raises:
      InputError: devices ordered so that two processes share some rows but not all.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    held: dict[int, set[int]] = {}
    for device, (index,) in batch_sharding(mesh).devices_indices_map((rows,)).items():
        held.setdefault(cast(Any, device).process_index, set()).add(index.indices(rows)[0])
    shares = sorted({tuple(sorted(starts)) for starts in held.values()})
    if len({start for share in shares for start in share}) != sum(map(len, shares)) or len(set(map(len, shares))) > 1:
        raise InputError(
            f"mesh {dict(mesh.shape)}: two processes share some rows of the batch but not all; make tensor divide, or be "
            "a multiple of, the devices of a process"
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays of this process's rows.

    Args:
      batch: pytree of NumPy arrays, this process's share of the rows first.
      mesh: the device mesh.

    Returns:
      The same tree of global jax arrays, rows split over data and fsdp.
    """
    sharding, shares = batch_sharding(mesh), batch_share(mesh)[1]

    def place(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_process_local_data(sharding, array, (shares * len(array), *array.shape[1:]))

    return jax.tree.map(place, batch)


def check_replication(tree: Any, mesh: Mesh, limit_mb: float) -> None:
    """Refuses trees in which a big array is whole on every device though the mesh could split it.

    Args:
      tree: arrays or shapes with ``sharding``.
      mesh: the device mesh; nothing is checked when fsdp and tensor are both 1.
      limit_mb: megabytes an array may replicate.

    Raises:
      InputError: names the arrays, the largest first, with their shapes and megabytes.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    worst = []
    for path, leaf in flat_paths(tree).items():
        size = leaf.size * leaf.dtype.itemsize / 1e6
        if size > limit_mb and leaf.sharding.shard_shape(leaf.shape) == tuple(leaf.shape):
            worst.append((size, path, leaf.shape))
    if worst:
        lines = [f"  {path} {tuple(shape)}: {size:.1f} MB" for size, path, shape in sorted(worst, reverse=True)]
        raise InputError(
            f"{len(worst)} arrays above train.replicated_limit_mb = {limit_mb:g} are replicated on a mesh of "
            f"fsdp {mesh.shape['fsdp']} x tensor {mesh.shape['tensor']}:\n" + "\n".join(lines)
        )
