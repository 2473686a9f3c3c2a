"""The device mesh and the one table from logical to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from tove_jax.config.schema import MeshConfig
from tove_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axes, tried in order; an axis is left whole when its size does not divide.
AXIS_RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": (),
    "rank": (),
    "layers": (),
    "tokens": (),
    "patch": (),
    "vocab": ("tensor",),
    "teacher": ("fsdp",),
}
# Activations follow the batch; their width is split only where tensor parallelism splits it.
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {**AXIS_RULES, "embed": (), "teacher": ()}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the (data, fsdp, tensor) mesh.

    Args:
      config: sizes; one may be -1. Of several TPU slices, `data` must be a multiple of their number.
      devices: all of `jax.devices()` when None.

    Returns:
      A mesh with Auto axes.

    Raises:
      InputError: sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    given = math.prod(size for size in sizes if size != -1)
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise InputError(f"mesh: sizes must be positive, at most one of them -1, found {sizes}")
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh: data x fsdp x tensor = {config.data} x {config.fsdp} x {config.tensor} "
            f"does not make the {len(devices)} devices found"
        )
    return Mesh(_laid_out(tuple(sizes), devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _laid_out(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Returns the devices in the mesh's shape, neighbours on the fastest links; `data` is outermost over slices."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    tpu = devices[0].platform == "tpu"
    if sizes[0] % len(slices) and not tpu:
        slices = {0: devices}  # nodes of GPUs, whose network carries sharded parameters too
    if sizes[0] % len(slices):
        raise InputError(
            f"mesh: data = {sizes[0]} is not a multiple of the {len(slices)} slices; parameters are not split over the "
            "network between slices"
        )
    inner = (sizes[0] // len(slices), *sizes[1:])
    laid = [
        # Splitting the axes of a torus gives more ways to lay a mesh on it.
        mesh_utils.create_device_mesh(inner, slices[index], allow_split_physical_axes=tpu)
        for index in sorted(slices)
    ]
    return np.concatenate(laid, axis=0)


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: dict[str, tuple[str, ...]]
) -> PartitionSpec:
    """Turns logical names into mesh axes, leaving whole what does not divide or is taken.

    Args:
      names: one a dimension; None is never sharded.
      shape: the array's global shape.
      mesh: anything with ``shape: {axis: size}``.
      rules: table of logical to mesh axes.

    Returns:
      The PartitionSpec.

    Raises:
      InputError: a name that the table does not have.
    """
    used: set[str] = set()
    entries: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise InputError(f"logical axis '{name}' has no rule; known: {', '.join(sorted(rules))}")
        axes = [a for a in (rules[name] if name else ()) if a not in used and mesh.shape[a] > 1]
        if axes and size % math.prod(mesh.shape[a] for a in axes) == 0:
            used.update(axes)
            entries.append(axes[0] if len(axes) == 1 else tuple(axes))
        else:
            entries.append(None)
    return PartitionSpec(*entries)


def constrain(x: Any, names: Sequence[str | None]) -> Any:
    """Constrains an activation to its logical axes; the identity outside `jax.set_mesh`.

    Args:
      x: array of any shape.
      names: one logical axis a dimension.

    Returns:
      The array.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or "fsdp" not in mesh.shape or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, mesh, ACTIVATION_RULES))
