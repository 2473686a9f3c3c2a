"""What a compiled step moves between chips, by kind, how often, over which links, and what runs meanwhile."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

from tove_jax.errors import InputError
from tove_jax.plan.hlo import COLLECTIVES, Computation, Instruction, Program

Seconds = Callable[[Computation, Instruction], float]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `tove_jax.plan.hlo.COLLECTIVES`.
      bytes: of the whole array: gathered, reduced, or before it is scattered.
      group: device numbers, in the order of the mesh, that take part with device 0 (or its first group's).
      times: how often it runs in a step.
      asynchronous: whether other instructions run between its start and its end.
      cover_s: roofline time of what runs meanwhile, once.
      where: operation of the program it comes from, as far as the compiler says.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    times: float
    asynchronous: bool
    cover_s: float
    where: str = ""

    @property
    def wire_bytes(self) -> float:
        """Bytes that one chip sends, once, by the ring algorithm or an equally good one."""
        n = len(self.group)
        share = (n - 1) / n if n else 0.0
        if self.kind == "all-reduce":
            return 2 * self.bytes * share
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * share


def collectives(
    program: Program, devices: int, seconds: Seconds, *, slices: int = 1, scattered: bool = False
) -> list[Collective]:
    """Returns all collectives of more than one device.

    TPUs' compiler writes an asynchronous collective as fusions that start it, carry it beside other work and end
    it; all bear the collective with one channel, and are counted as one. Between slices it writes transfers to the
    host's runtime; such a one is between devices of the same place in each slice.

    Args:
      program: compiled and scheduled.
      devices: of the mesh.
      seconds: roofline time of an instruction.
      slices: of equal numbers of devices, one after another.
      scattered: count an all-reduce of which only a slice is read as the reduce-scatter that other compilers make
        of it.
    """
    found = []
    for computation, times in program.runs():
        found += _of_computation(program, computation, times, devices, seconds, scattered)
        found += _between_slices(program, computation, times, devices, seconds, slices)
    return found


def _between_slices(
    program: Program, where: Computation, times: float, devices: int, seconds: Seconds, slices: int
) -> list[Collective]:
    spans: dict[str, list[int]] = {}
    sent: dict[str, Instruction] = {}
    met: dict[str, str] = {}
    for place, one in enumerate(where.instructions):
        named = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', one.rest)
        if one.opcode == "send" and named:
            sent[named[1]] = one
            spans.setdefault(named[1], []).append(place)
        elif one.opcode == "recv" and named:
            met[one.name] = named[1]
        elif one.opcode == "recv-done" and one.operands[0] in met:
            spans.setdefault(met[one.operands[0]], []).append(place)
    group = tuple(range(0, devices, max(1, devices // slices)))
    found = []
    for name, one in sent.items():
        first, last = min(spans[name]), max(spans[name])
        beside = where.instructions[first + 1 : last]
        cover = sum(_seconds(program, where, part, seconds) for part in beside)
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest)
        spelt = kind[1].lower().replace("_", "-") if kind else ""
        spelt = spelt if spelt in COLLECTIVES else "collective-permute"
        size = one.shapes[0].bytes * (len(group) if spelt == "all-gather" else 1)
        found.append(Collective(spelt, size, group, times, last > first + 1, cover, _label(one)))
    return found


def _of_computation(
    program: Program, where: Computation, times: float, devices: int, seconds: Seconds, scattered: bool
) -> list[Collective]:
    spans: dict[str, list[tuple[int, Instruction, Computation]]] = {}
    for place, one in enumerate(where.instructions):
        for inside, collective in _carried(program, where, one):
            if collective.opcode.endswith("-done"):
                key = _start_of(inside, collective)
            else:
                channel = collective.attribute("channel_id")
                key = collective.name if channel is None or inside is where else f"channel {channel}"
            spans.setdefault(key, []).append((place, collective, inside))
    result = []
    for parts in spans.values():
        first, last = parts[0][0], parts[-1][0]
        # A loop between start and end may carry it too, or the next round of this one end it: counted where it starts.
        starts = [(one, inner) for _, one, inner in parts if _begins(where, inner, one)]
        if not starts:
            continue
        begin, inside = starts[0]
        group = members(begin, devices)
        if len(group) < 2:
            continue
        carriers = {place for place, *_ in parts}
        between = range(first, last + 1)
        # A fusion that carries a collective beside its own work is time to hide in; the ends are not.
        beside = [place for place in between if place not in carriers or place not in (first, last)]
        cover = sum(_seconds(program, where, where.instructions[place], seconds) for place in beside)
        kind = _kind(program, where, inside, begin, scattered)
        result.append(Collective(kind, _size(inside, begin, kind), group, times, last > first, cover, _label(begin)))
    return result


def _carried(program: Program, where: Computation, one: Instruction) -> list[tuple[Computation, Instruction]]:
    """Returns the collectives that an instruction is, starts, carries or ends, with the computation they stand in."""
    if _base(one.opcode) in COLLECTIVES:
        return [(where, one)]
    if one.opcode == "call-done":  # of one that another core of the chip runs
        one = where.by_name.get(_start_of(where, one), one)
    inner = program.inner(one)
    if inner is None:
        return []
    found = []
    for part in inner.instructions:
        found += _carried(program, inner, part)
    return found


def _begins(where: Computation, inside: Computation, one: Instruction) -> bool:
    """Whether a collective starts here, or runs from start to end, rather than being carried or ended."""
    return not one.opcode.endswith("-done") if inside is where else not inside.carries


def _seconds(program: Program, where: Computation, one: Instruction, seconds: Seconds) -> float:
    """Returns an instruction's time; a loop's is that of all its rounds."""
    body = one.attribute("body") if one.opcode == "while" else None
    if body is None:
        return seconds(where, one)
    inner = program.computations[body]
    once = sum(_seconds(program, inner, part, seconds) for part in inner.instructions)
    return program.trips(where, one) * once


def _base(opcode: str) -> str:
    return opcode.removesuffix("-start").removesuffix("-done")


def _start_of(where: Computation, done: Instruction) -> str:
    name = done.operands[0] if done.operands else done.name
    one = where.by_name.get(name)
    while one is not None and one.opcode in ("get-tuple-element", "bitcast", "copy", "opt-barrier"):
        name = one.operands[0]
        one = where.by_name.get(name)
    return name


def _kind(program: Program, where: Computation, inside: Computation, one: Instruction, scattered: bool) -> str:
    kind = _base(one.opcode)
    if kind != "all-reduce":
        return kind
    readers = inside.users[one.name]
    if inside is not where and readers and all(reader.opcode in ("dynamic-slice", "slice") for reader in readers):
        return "reduce-scatter"  # a fusion of the two
    if scattered and readers and all(_slices(program, reader, one) for reader in readers):
        return "reduce-scatter"
    return kind


def _slices(program: Program, reader: Instruction, one: Instruction) -> bool:
    if reader.opcode == "dynamic-slice":
        return True
    inner = program.inner(reader) if reader.opcode == "fusion" else None
    if inner is None:
        return False
    number = reader.operands.index(one.name)
    users = inner.users[inner.parameters[number].name]
    while len(users) == 1 and users[0].opcode in ("bitcast", "convert", "copy", "reshape"):
        users = inner.users[users[0].name]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _size(inside: Computation, one: Instruction, kind: str) -> float:
    if kind == "all-gather":
        # The start's result holds the operands too.
        given = sum(inside.by_name[name].bytes for name in one.operands if name in inside.by_name)
        return one.bytes - given if one.opcode.endswith("-start") else one.bytes
    given = sum(inside.by_name[name].bytes for name in one.operands if name in inside.by_name)
    return given or one.bytes


def _label(one: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', one.rest)
    return found[1] if found else ""


def members(one: Instruction, devices: int) -> tuple[int, ...]:
    """Returns the devices of a collective's first group; of a permutation, the first pair of two devices.

    Raises:
      InputError: groups written in a way that is not known.
    """
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", one.rest)
    if pairs:
        read = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
        return next((pair for pair in read if pair[0] != pair[1]), ())
    listed = re.search(r"replica_groups=\{(.*?)\}(?:,|\s|$)", one.rest)
    if listed:
        groups = re.findall(r"\{([\d,]+)\}", "{" + listed[1].strip("{}") + "}") if listed[1] else []
        return tuple(map(int, groups[0].split(","))) if groups else tuple(range(devices))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", one.rest)
    if iota:
        order = _iota(_numbers(iota[2]), _numbers(iota[3]) if iota[3] else None)
        return tuple(order[: _numbers(iota[1])[-1]])
    mesh = re.search(r"replica_groups=(?:@?[\w.]*)?mesh\[(.*?)\]\s*(.*?)\{([^}]*)\}", one.rest)
    if mesh:
        return _of_mesh(mesh[1], mesh[2], mesh[3])
    raise InputError(f"compiled program: the groups of {one.name} are written in an unknown way: {one.rest[:120]}")


def _of_mesh(axes: str, order: str, chosen: str) -> tuple[int, ...]:
    sizes = {name: int(size) for name, size in re.findall(r"['\"]?([\w.]+)['\"]?=(\d+)", axes)}
    strides, stride = {}, 1
    for name in reversed(sizes):
        strides[name], stride = stride, stride * sizes[name]
    places = [0]
    for name, before, size in re.findall(r"['\"]?([A-Za-z_][\w.]*)['\"]?(?::\((\d+)\)(\d+))?", chosen):
        # Part of an axis: of sizes before x size x rest.
        length = int(size) if size else sizes[name]
        step = strides[name] * (sizes[name] // (int(before) * length) if size else 1)
        places = [place + number * step for place in places for number in range(length)]
    given = re.search(r"device_ids=\(?\[([\d,]+)\](?:<=\[[\d,]+\])?(?:T\(([\d,]+)\))?", order)
    if given:
        numbers = _numbers(given[1])
        if given[2] or len(numbers) != stride:
            numbers = _iota(numbers, _numbers(given[2]) if given[2] else None)
        return tuple(numbers[place] for place in places)
    return tuple(places)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _iota(shape: Sequence[int], transposed: Sequence[int] | None) -> list[int]:
    """Returns 0, 1, ... of a shape, its axes transposed, flat."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    order = list(transposed) if transposed is not None else list(range(len(shape)))
    numbers = [0]
    for axis in order:
        numbers = [number + index * strides[axis] for number in numbers for index in range(shape[axis])]
    return numbers
