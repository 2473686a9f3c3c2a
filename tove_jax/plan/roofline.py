"""From what a compiled step does to how long it takes: the roofline of compute, memory and network.

Each instruction takes the longer of its operations at the chip's peak and its bytes at the memory's bandwidth;
instructions run one after another. A collective takes its bytes at the links' bandwidth, not at the memory's, and of
that only what does not fit beside the instructions between its start and its end. Nothing is said of latency, of the shapes that a
matrix unit fills badly, or of links that two collectives share; so this is a bound from below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tove_jax.plan.chips import Chip, Topology
from tove_jax.plan.collectives import Collective, collectives
from tove_jax.plan.hlo import Computation, Instruction, Program


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a device lies: its slice or node, and its chip's coordinates there."""

    slice: int
    coords: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over one kind of link.

    Attributes:
      kind: see `tove_jax.plan.hlo.COLLECTIVES`.
      link: ``chip`` or ``network`` (between slices or nodes).
      count: how many run in a step.
      bytes: that one device sends in a step.
      seconds: that this takes.
      hidden_s: of these, seconds that fit beside other instructions.
    """

    kind: str
    link: str
    count: float
    bytes: float
    seconds: float
    hidden_s: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """One device's step.

    Attributes:
      flops: operations in products and convolutions.
      bytes: to and from main memory.
      compute_s: operations at the chip's peak.
      memory_s: bytes at the memory's bandwidth.
      busy_s: sum over instructions, without collectives, of the longer of the two.
      network_s: all collectives.
      exposed_s: of these, what nothing hides.
      traffic: by kind and link.
    """

    flops: float
    bytes: float
    compute_s: float
    memory_s: float
    busy_s: float
    network_s: float
    exposed_s: float
    traffic: tuple[Traffic, ...]

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.busy_s + self.exposed_s

    @property
    def bound(self) -> str:
        """What the step waits for most."""
        times = {"compute": self.compute_s, "memory": self.busy_s - self.compute_s, "network": self.exposed_s}
        return max(times, key=lambda name: times[name])


def roofline(program: Program, topology: Topology, places: Sequence[Place], *, scattered: bool = False) -> Roofline:
    """Reads a compiled step's roofline.

    Args:
      program: of one device.
      topology: whose chips it is for.
      places: of every device, in the order of the mesh.
      scattered: see `tove_jax.plan.collectives.collectives`.
    """
    chip = topology.chip.device
    flops = bytes_ = busy = 0.0

    def seconds(where: Computation, one: Instruction) -> float:
        return program.seconds(where, one, chip.flops, chip.bandwidth)

    for computation, times in program.runs():
        for one in computation.instructions:
            flops += times * program.flops(computation, one)
            bytes_ += times * program.bytes(computation, one)
            busy += times * seconds(computation, one)
    slices = len({place.slice for place in places})
    found = collectives(program, len(places), seconds, slices=slices, scattered=scattered)
    traffic = sum_up(found, topology, places)
    total, hidden = (sum(getattr(part, name) for part in traffic) for name in ("seconds", "hidden_s"))
    hidden = min(hidden, busy)  # two collectives may hide beside the same work
    return Roofline(
        flops=flops,
        bytes=bytes_,
        compute_s=flops / chip.flops,
        memory_s=bytes_ / chip.bandwidth,
        busy_s=busy,
        network_s=total,
        exposed_s=total - hidden,
        traffic=traffic,
    )


def sum_up(found: Sequence[Collective], topology: Topology, places: Sequence[Place]) -> tuple[Traffic, ...]:
    """Adds up collectives by kind and link, the largest first."""
    parts: dict[tuple[str, str], list[float]] = {}
    for one in found:
        link, rate = speed(one, topology, places)
        once = one.wire_bytes / rate
        hidden = min(once, one.cover_s) if one.asynchronous else 0.0
        sums = parts.setdefault((one.kind, link), [0.0] * 4)
        for place, value in enumerate((1.0, one.wire_bytes, once, hidden)):
            sums[place] += one.times * value
    rows = [Traffic(kind, link, *sums) for (kind, link), sums in parts.items()]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def speed(one: Collective, topology: Topology, places: Sequence[Place]) -> tuple[str, float]:
    """Returns the slowest kind of link that a collective needs, and the bytes a second one device sends over it.

    On a torus a collective runs along each dimension in which its devices differ, both ways round where that
    dimension closes to a ring and the devices fill it, so that bandwidths add up.
    """
    chip: Chip = topology.chip.device
    members = [places[device] for device in one.group]
    if len({member.slice for member in members}) > 1:
        return "network", chip.network
    if not chip.axes:
        return "chip", chip.link
    rate = 0.0
    for axis in range(len(topology.shape)):
        count = len({member.coords[axis] for member in members})
        if count > 1:
            closed = topology.ring(axis) and count == topology.shape[axis]
            rate += chip.link * (2 if closed else 1)
    # Devices of one chip: its cores talk at least as fast as chips do.
    return "chip", rate or chip.link
