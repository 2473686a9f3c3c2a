"""Published figures of chips, and topologies by name."""

from __future__ import annotations

import dataclasses
import math
import re

from tove_jax.errors import InputError, nearest

GIB = 2**30
_CLOUD = "docs.cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip, as its maker publishes it; what a program runs on is a device, a chip or half of one.

    Attributes:
      name: ours.
      kind: what JAX calls the device.
      platform: ``tpu``, ``gpu`` or ``cpu``.
      flops: peak bfloat16 operations a second, dense.
      memory: bytes of main memory.
      bandwidth: bytes a second to it.
      link: bytes a second of one link to a neighbour, one way; of a GPU, all links together.
      axes: dimensions of the torus; 0: every chip of a node reaches every other one.
      ring: chips in a dimension from which on, or in multiples of which, it closes to a ring.
      network: bytes a second a chip to other slices or nodes.
      cores: devices a chip.
      named: what a chip counts in the number of an accelerator type: v5p's count cores, of which it has two.
      host: chips a host.
      source: where the figures are published.
    """

    name: str
    kind: str
    platform: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    axes: int
    ring: int
    network: float
    cores: int = 1
    named: int = 1
    host: int = 4
    source: str = ""

    @property
    def device(self) -> Chip:
        """Returns the share of one device."""
        return dataclasses.replace(
            self,
            flops=self.flops / self.cores,
            memory=self.memory // self.cores,
            bandwidth=self.bandwidth / self.cores,
            link=self.link / self.cores,
            network=self.network / self.cores,
            cores=1,
            host=self.host * self.cores,
        )


# A link's one-way rate is the published two-way rate of the chip by its ports, halved.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", "tpu", 197e12, 16 * GIB, 819e9, 50e9, 2, 16, 3.125e9, source=_CLOUD + "v5e"),
        Chip(
            "v5p",
            "TPU v5",
            "tpu",
            459e12,
            95 * GIB,
            2765e9,
            100e9,
            3,
            4,
            6.25e9,
            named=2,
            source=_CLOUD + "v5p",
        ),
        Chip("v6e", "TPU v6 lite", "tpu", 918e12, 32 * GIB, 1638e9, 100e9, 2, 16, 12.5e9, source=_CLOUD + "v6e"),
        Chip(
            "tpu7x",
            "TPU7x",
            "tpu",
            2307e12,
            192 * GIB,
            7380e9,
            100e9,
            3,
            4,
            12.5e9,
            cores=2,
            named=2,
            source=_CLOUD + "tpu7x",
        ),
        Chip(
            "h100",
            "NVIDIA H100 SXM",
            "gpu",
            989.4e12,
            80 * 10**9,
            3.35e12,
            450e9,
            0,
            0,
            50e9,
            host=8,
            source="nvidia.com/en-us/data-center/h100; network: one 400 Gb/s adapter a GPU, as in DGX H100",
        ),
        Chip(
            "h200",
            "NVIDIA H200 SXM",
            "gpu",
            989.4e12,
            141 * 10**9,
            4.8e12,
            450e9,
            0,
            0,
            50e9,
            host=8,
            source="nvidia.com/en-us/data-center/h200; network: one 400 Gb/s adapter a GPU, as in DGX H200",
        ),
        Chip(
            "cpu",
            "cpu",
            "cpu",
            1e11,
            8 * GIB,
            2e10,
            1e10,
            0,
            0,
            1e9,
            host=8,
            source="none: round numbers, for trying the command",
        ),
    )
}

# Shapes that the maker offers of a number of chips.
_PLANE = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBE = {
    **{4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)},
    **{256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16)},
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they lie.

    Attributes:
      chip: their kind.
      shape: of one slice or node.
      slices: number of slices or nodes.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """All chips."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """What JAX sees."""
        return self.chips * self.chip.cores

    @property
    def hosts(self) -> int:
        """Hosts at the least."""
        return max(self.slices, -(-self.chips // self.chip.host))

    @property
    def name(self) -> str:
        """Its name as `parse` takes it, with the slices before it."""
        one = f"{self.chip.name}:" + "x".join(map(str, self.shape))
        return one if self.slices == 1 else f"{self.slices} x {one}"

    def ring(self, axis: int) -> bool:
        """Whether a dimension of a slice closes to a ring."""
        size, ring = self.shape[axis], self.chip.ring
        if not ring:
            return False
        # Cubes of 4 x 4 x 4 are joined by switches, so that every dimension of whole cubes closes.
        return size >= ring if self.chip.axes == 2 else all(side % ring == 0 for side in self.shape)


def parse(text: str, slices: int = 1) -> Topology:
    """Reads a topology.

    Args:
      text: ``v5e:16x16``, a shape; or ``v5e-256``, an accelerator type, which counts chips of v5e and v6e and
        cores of v5p and tpu7x; ``h200:8`` GPUs of a node, ``cpu:8`` processors that are faked.
      slices: slices of a TPU, or nodes, of that shape.

    Raises:
      InputError: an unknown chip, a shape that does not fit it, or a number that is not offered.
    """
    found = re.fullmatch(r"([a-z]\w*?)(?:litepod)?([:-])(\d+(?:x\d+)*)", text)
    if not found or slices < 1:
        raise InputError(
            f"--topology {text!r} --slices {slices}: expected chip:shape or chip-number, such as v5e:16x16, v5p-128 "
            "or h200:8, and one slice or more"
        )
    name, sign, numbers = found.groups()
    chip = CHIPS.get({"v5lite": "v5e", "v5": "v5e", "7x": "tpu7x"}.get(name, name))
    if chip is None:
        raise InputError(f"--topology {text!r}: no chip '{name}'{nearest(name, CHIPS)}; known: {', '.join(CHIPS)}")
    shape = tuple(int(number) for number in numbers.split("x"))
    if not chip.axes:
        if len(shape) != 1:
            raise InputError(f"--topology {text!r}: expected a number of devices a node, more nodes by --slices")
        return Topology(chip, shape, slices)
    if sign == "-":
        count = shape[0] // chip.named
        table = _PLANE if chip.axes == 2 else _CUBE
        if len(shape) != 1 or count not in table or count * chip.named != shape[0]:
            known = ", ".join(f"{chip.name}-{number * chip.named}" for number in table)
            raise InputError(f"--topology {text!r}: expected one of {known}, or a shape as in {chip.name}:...")
        shape = table[count]
    if len(shape) != chip.axes or min(shape) < 1:
        raise InputError(f"--topology {text!r}: expected {chip.axes} dimensions, found {len(shape)}")
    return Topology(chip, shape, slices)
