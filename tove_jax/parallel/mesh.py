"""The device mesh and the one table from logical to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from tove_jax.config.schema import Config, MeshConfig
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


def run_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh of a run; see `make_mesh`."""
    return make_mesh(config.mesh, devices, rows=rows_at_once(config), heads=common_heads(config))


def rows_at_once(config: Config) -> int:
    """Returns the rows of a micro-batch, which the mesh splits."""
    return config.train.batch // config.train.accumulation


def common_heads(config: Config) -> int:
    """Returns the number that divides the heads of all of a run's models, which bounds ``tensor``."""
    heads, language = config.student.heads, config.language
    if language.kind == "none":
        return heads
    return math.gcd(heads, language.kv_heads if language.kind == "llava" else language.heads)


def make_mesh(
    config: MeshConfig, devices: Sequence[Any] | None = None, *, rows: int | None = None, heads: int = 1
) -> Mesh:
    """Builds the (data, fsdp, tensor) mesh.

    Args:
      config: sizes, see `fit_sizes`. Of several TPU slices, `data` must be a multiple of their number.
      devices: all of `jax.devices()` when None.
      rows: see `fit_sizes`.
      heads: see `fit_sizes`.

    Returns:
      A mesh with Auto axes.

    Raises:
      InputError: sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({_slice_of(device) for device in devices})
    return Mesh(
        _laid_out(fit_sizes(config, len(devices), slices, rows=rows, heads=heads), devices),
        AXES,
        axis_types=(AxisType.Auto,) * 3,
    )


def fit_sizes(
    config: MeshConfig, devices: int, slices: int = 1, *, rows: int | None = None, heads: int = 1
) -> tuple[int, int, int]:
    """Returns (data, fsdp, tensor) with every -1 found.

    ``tensor`` is the smallest divisor of the heads that lets the rows divide over the other devices. ``fsdp`` is the
    largest divisor of a slice's devices up to ``fsdp_limit``, and ``data`` takes the rest: then what a device sends
    does not grow with their number. Where a single size is -1, it takes what is left.

    Args:
      config: sizes.
      devices: their number.
      slices: TPU slices or nodes of GPUs among which they are shared out evenly.
      rows: of a micro-batch; None: not known, any number.
      heads: what ``tensor`` must divide.

    Raises:
      InputError: sizes that do not multiply to the number of devices; a batch that no size of ``tensor`` fits.
    """
    data, fsdp, tensor = given = config.data, config.fsdp, config.tensor
    if any(size == 0 or size < -1 for size in given) or config.fsdp_limit < 1:
        raise InputError(
            f"config.mesh: sizes must be positive or -1, and fsdp_limit positive, found {given} and {config.fsdp_limit}"
        )
    known = math.prod(size for size in given if size != -1)
    if given.count(-1) == 1 and devices % known == 0:
        return tuple(devices // known if size == -1 else size for size in given)  # type: ignore[return-value]
    if tensor == -1 and given.count(-1) > 1 and devices % known == 0:
        shards = (size for size in range(1, heads + 1) if heads % size == 0 and devices // known % size == 0)
        tensor = next((size for size in shards if rows is None or rows % (devices // size) == 0), 0)
        if not tensor:
            raise InputError(
                f"config.mesh.tensor: no divisor of {heads} heads lets train.batch / train.accumulation = {rows} rows "
                f"divide over the rest of {devices} devices"
            )
    if (data, fsdp) == (-1, -1):
        inside = max(1, devices // slices // tensor)
        fsdp = max(size for size in range(1, min(inside, config.fsdp_limit) + 1) if inside % size == 0)
    if fsdp == -1:
        fsdp = devices // (data * tensor)
    if data == -1:
        data = devices // (fsdp * tensor)
    if data * fsdp * tensor != devices:
        raise InputError(
            f"config.mesh: data x fsdp x tensor = {' x '.join(map(str, given))} does not make the {devices} devices found"
        )
    return data, fsdp, tensor


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def _laid_out(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Returns the devices in the mesh's shape, neighbours on the fastest links; `data` is outermost over slices."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(_slice_of(device), []).append(device)
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
