"""Runs a loaded expert on batches of pixels: compiled once, on all devices of this process, in a batch that fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tove_jax.errors import InputError
from tove_jax.experts.base import Expert, ExpertFeatures

BATCH = 16
"""Pictures a call where nothing tells how many fit: on CPUs and for experts on the host. Ours."""
LARGEST = 256
"""Pictures a device and call at most: beyond, nothing gets faster. Ours."""
# What the compiler's account of one batch leaves out, such as fragments.
_SHARE = 0.7
_PROBE = 4


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no memory left."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


class Runner:
    """An expert ready to be called, for as many stores as show it pictures of one size.

    Attributes:
      expert: what runs.
    """

    def __init__(self, expert: Expert, batch: int = 0) -> None:
        """Prepares an expert; nothing runs yet.

        Args:
          expert: loaded.
          batch: pictures a call; 0: as many as the devices' free memory takes by the compiler's account,
            `BATCH` where there is no such account.

        Raises:
          InputError: a negative batch.
        """
        if batch < 0:
            raise InputError(f"batch: expected 0 or more, found {batch}")
        self.expert = expert
        self._call: Callable[[np.ndarray], ExpertFeatures] | None = None
        self._batch = batch

    @property
    def batch(self) -> int:
        """Pictures a call; found when first asked for, made smaller by `halve`."""
        if not self._batch:
            self._batch = self._fitting() if self.expert.card.backend == "jax" else BATCH
        return self._batch

    def __call__(self, pixels: np.ndarray) -> ExpertFeatures:
        """Runs the expert on uint8 (batch, size, size, 3); JAX arrays come back before they are computed."""
        if self._call is None:
            self._call = self._compiled() if self.expert.card.backend == "jax" else self._host
        return self._call(pixels)

    def halve(self, error: BaseException) -> None:
        """Goes on with half the batch.

        Raises:
          InputError: one picture does not fit.
        """
        if self.batch == 1:
            raise InputError(f"expert {self.expert.card.name!r}: no memory for a single picture: {error}") from error
        self._batch = max(1, self.batch // 2)
        self._call = None

    def _host(self, pixels: np.ndarray) -> ExpertFeatures:
        return self.expert.apply(self.expert.params, pixels)

    def _compiled(self) -> Callable[[np.ndarray], ExpertFeatures]:
        import jax  # here, so that host experts do without

        devices = jax.local_devices()
        devices = devices[: math.gcd(len(devices), self.batch)]
        mesh = jax.sharding.Mesh(np.asarray(devices), ("batch",))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = jax.device_put(self.expert.params, everywhere)
        apply = jax.jit(self.expert.apply)
        return lambda pixels: apply(params, jax.device_put(pixels, rows))

    def _fitting(self) -> int:
        import jax

        devices = jax.local_devices()
        memory = devices[0].memory_stats() or {}
        if "bytes_limit" not in memory:
            return BATCH
        size = self.expert.card.view.size
        pixels = jax.ShapeDtypeStruct((_PROBE, size, size, 3), np.uint8)
        needs = jax.jit(self.expert.apply).lower(self.expert.params, pixels).compile().memory_analysis()
        if needs is None:
            return BATCH
        picture = (needs.temp_size_in_bytes + 2 * needs.output_size_in_bytes) / _PROBE
        free = memory["bytes_limit"] - max(memory.get("bytes_in_use", 0), needs.argument_size_in_bytes)
        return len(devices) * fitting(free, picture)


def fitting(free: float, picture: Any) -> int:
    """Returns the largest power of two of pictures, up to `LARGEST`, that takes no more than a share of `free` bytes."""
    count = int(_SHARE * free / max(1.0, picture))
    return min(LARGEST, 1 << max(0, count.bit_length() - 1))
