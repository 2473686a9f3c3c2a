"""Compiled programs read from their text: computations, how often each runs, operations and bytes of each instruction.

The compiler's own account counts the body of a loop once; here it counts as often as it runs. The text is what
``compiled.as_text()`` gives, scheduled: the instructions of a computation run in the order in which they stand.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tove_jax.errors import InputError

_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_TAIL = re.compile(r'^\}(, execution_thread="\w+")?\s*$')
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
# They move nothing: names for parts of other buffers, or bookkeeping.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "opt-barrier", "async-done", "copy-done", "add-dependency", "iota"),
    *("send-done", "recv", "recv-done", "domain"),
}
_TOLD = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')  # what a kernel says of itself
_ALLOCATES = 'custom_call_target="AllocateBuffer"'
_SLICES = ("dynamic-slice", "slice", "gather")
# How TPUs' compiler writes a collective that runs beside other work: fusions that start it, carry it and end it.
_STARTS, _ENDS = (f'custom_call_target="AsyncCollective{part}"' for part in ("Start", "Done"))
_CARRIES = "async_collective_fusion"
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


class Shape(NamedTuple):
    """An array in the program.

    Attributes:
      dtype: as the text calls it, such as ``bf16``.
      dims: sizes.
      near: it lies in the chip's fast memory and takes no bandwidth of the main one.
    """

    dtype: str
    dims: tuple[int, ...]
    near: bool = False

    @property
    def bytes(self) -> float:
        """Bytes without padding."""
        return math.prod(self.dims) * _bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without ``%``.
      opcode: such as ``fusion``.
      shapes: of its result; several for a tuple, nested ones flattened.
      operands: names.
      rest: what follows the operands.
      argument: text between the parentheses.
      root: whether it is the computation's result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    argument: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """Returns a computation's name or a number that an attribute holds, or None."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)


class Computation:
    """Instructions in the order in which they run, also by name."""

    def __init__(self, name: str, instructions: list[Instruction]):
        self.name, self.instructions = name, instructions
        self.by_name = {one.name: one for one in instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        """The result."""
        return next((one for one in self.instructions if one.root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        return {int(one.argument): one for one in self.instructions if one.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each one."""
        found: dict[str, list[Instruction]] = {one.name: [] for one in self.instructions}
        for one in self.instructions:
            for operand in dict.fromkeys(one.operands):
                found.setdefault(operand, []).append(one)
        return found

    @functools.cached_property
    def carries(self) -> bool:
        """Whether a collective in a fused computation began elsewhere, and is carried beside other work or ended here."""
        if any(_STARTS in one.rest for one in self.instructions):
            return False
        return self.name.startswith(_CARRIES) or any(_ENDS in one.rest for one in self.instructions)

    def passes(self, one: Instruction) -> bool:
        """Whether an instruction hands buffers on as they are, rather than reading or filling them."""
        if one.opcode == "tuple":
            return one.root
        return self.carries and (one.opcode in COLLECTIVES or _ENDS in one.rest)


class Program:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: name of the one that runs first.
    """

    def __init__(self, text: str):
        """Reads the text.

        Raises:
          InputError: it has no entry.
        """
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        name = ""
        lines: list[str] = []
        for line in text.splitlines():
            if not line[:1].isspace() and line.endswith("{") and (head := _HEAD.match(line)):
                name, lines = head[2], []
                self.entry = name if head[1] else self.entry
            elif name and _TAIL.match(line):
                instructions = [_instruction(whole, found) for whole in lines if (found := _LINE.match(whole))]
                self.computations[name], name = Computation(name, instructions), ""
            elif name and _LINE.match(line):
                lines.append(line)
            elif name and lines:
                lines[-1] += " " + line  # what a kernel says of itself may hold line breaks
        if not self.entry:
            raise InputError("compiled program: expected the text of an HLO module, found none with an entry")
        self._flops: dict[str, float] = {}

    def runs(self) -> Iterator[tuple[Computation, float]]:
        """Yields each computation whose instructions run one after another, with how often it runs.

        Fused computations are part of the instruction that calls them. A branch counts as always taken.
        """
        counts: dict[str, float] = {}

        def visit(name: str, times: float) -> None:
            counts[name] = counts.get(name, 0.0) + times
            for one in self.computations[name].instructions:
                if one.opcode == "while":
                    body = one.attribute("body")
                    if body:
                        visit(body, times * self.trips(self.computations[name], one))
                elif one.opcode == "call" and (target := one.attribute("to_apply")):
                    visit(target, times)
                elif one.opcode == "conditional":
                    for target in _branches(one):
                        visit(target, times)

        visit(self.entry, 1.0)
        for name, times in counts.items():
            yield self.computations[name], times

    def trips(self, where: Computation, loop: Instruction) -> int:
        """Returns how often a loop's body runs.

        Read from the compiler's note, else from ``counter < constant`` in the condition.

        Raises:
          InputError: neither is there.
        """
        known = re.search(r'known_trip_count":?\{"?n"?:"?(\d+)', loop.rest)
        if known:
            return int(known[1])
        condition = self.computations[loop.attribute("condition") or ""]
        body = self.computations[loop.attribute("body") or ""]
        compare, inside = condition.root, condition
        read: dict[str, Instruction] = {}
        if compare.opcode == "fusion":
            inside = self.computations[compare.attribute("calls") or ""]
            read = {
                parameter.name: condition.by_name[compare.operands[number]]
                for number, parameter in inside.parameters.items()
            }
            compare = inside.root
        sides = [read.get(operand, inside.by_name[operand]) for operand in compare.operands]
        bound = next((int(side.argument) for side in sides if side.opcode == "constant"), None)
        place = next((int(side.attribute("index") or 0) for side in sides if side.opcode == "get-tuple-element"), None)
        direction = compare.attribute("direction")
        if compare.opcode != "compare" or bound is None or place is None or direction not in ("LT", "LE", "GT", "GE"):
            raise InputError(f"compiled program: the length of loop {loop.name} is not known")
        start = self._constant(where, _part(where, loop.operands[0], place)) or 0
        step = 1
        following = _part(body, body.root.name, place)
        if following is not None and following.opcode in ("add", "subtract"):
            numbers = [self._constant(body, body.by_name.get(operand)) for operand in following.operands]
            step = next((abs(number) for number in numbers if number), 1)
        return max(0, math.ceil((abs(bound - start) + (direction in ("LE", "GE"))) / step))

    def _constant(self, where: Computation, one: Instruction | None) -> int | None:
        while one is not None and one.opcode in ("copy", "bitcast"):
            one = where.by_name.get(one.operands[0])
        if one is None or one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.argument):
            return None
        return int(one.argument)

    def flops(self, where: Computation, one: Instruction) -> float:
        """Returns an instruction's operations in products and convolutions, two a multiplication with its sum."""
        if one.opcode == "dot":
            left = where.by_name[one.operands[0]].shapes[0].dims
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
            axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
            return 2.0 * math.prod(one.shapes[0].dims) * math.prod(left[axis] for axis in axes)
        if one.opcode == "convolution":
            return _convolution_flops(where, one)
        if one.opcode == "custom-call" and (told := _TOLD.search(one.rest)):
            return float(told[1])
        inner = self.inner(one)
        if inner is None:
            return 0.0
        if inner.name not in self._flops:
            self._flops[inner.name] = sum(self.flops(inner, part) for part in inner.instructions)
        return self._flops[inner.name]

    def bytes(self, where: Computation, one: Instruction) -> float:
        """Returns the bytes that an instruction reads from and writes to main memory.

        Of an array that it only cuts a slice from, or writes a slice into, the slice counts; what a fusion hands on as
        it is does not, so that a collective which others carry counts where it starts.
        """
        if one.opcode in _FREE or one.opcode.endswith("-done") or _ALLOCATES in one.rest:
            return 0.0
        shapes = [where.by_name[operand].shapes for operand in one.operands if operand in where.by_name]
        if one.opcode == "fusion" and (inner := self.inner(one)):
            read = sum(self._read(inner, number) for number in range(len(one.operands)) if not _near(shapes, number))
            return read + self._written(inner, one.shapes)
        if one.opcode == "dynamic-update-slice":
            return 2 * sum(shape.bytes for shape in shapes[1] if not shape.near)
        results = _results(one, [shape for parts in shapes for shape in parts])
        written = sum(shape.bytes for shape in results if not shape.near)
        if one.opcode.removesuffix("-start") in _SLICES:
            return written + (0.0 if _near(shapes, 0) else results[0].bytes)
        return written + sum(shape.bytes for parts in shapes for shape in parts if not shape.near)

    def seconds(self, where: Computation, one: Instruction, flops: float, bandwidth: float) -> float:
        """Returns an instruction's roofline time: the longer of its operations and its bytes.

        A collective's bytes take no time of their own: they come and go at the pace of the network, which is counted
        apart.

        Args:
          where: the computation that it stands in.
          one: the instruction.
          flops: operations a second of the chip.
          bandwidth: bytes a second of its main memory.
        """
        compute = self.flops(where, one) / flops
        return compute if self._collective(one) else max(compute, self.bytes(where, one) / bandwidth)

    def _collective(self, one: Instruction) -> bool:
        """Whether an instruction is a collective, or starts one, rather than carrying it beside work of its own."""
        if one.opcode.removesuffix("-start") in COLLECTIVES:
            return True
        called = self.inner(one) if one.opcode in ("fusion", "call-start") else None
        return called is not None and not called.carries and any(map(self._collective, called.instructions))

    def inner(self, one: Instruction) -> Computation | None:
        """Returns the computation that a fusion is made of, or that is called while others run, if it is known."""
        attribute = {"fusion": "calls", "async-start": "calls", "call-start": "to_apply"}.get(one.opcode)
        return self.computations.get(one.attribute(attribute) or "") if attribute else None

    def _read(self, inner: Computation, number: int, depth: int = 0) -> float:
        """Returns the bytes that a fused computation reads of a parameter."""
        parameter = inner.parameters.get(number)
        if parameter is None:
            return 0.0
        whole, total = parameter.bytes, 0.0
        for user in inner.users[parameter.name]:
            places = [place for place, operand in enumerate(user.operands) if operand == parameter.name]
            if inner.passes(user):
                continue
            if user.opcode in _SLICES and places == [0]:
                total += user.bytes
            elif user.opcode == "dynamic-update-slice" and places == [0]:
                continue
            elif user.opcode == "fusion" and depth < 8 and (called := self.inner(user)):
                total += sum(self._read(called, place, depth + 1) for place in places)
            else:
                return whole
        return min(whole, total)

    def _written(self, inner: Computation, shapes: tuple[Shape, ...]) -> float:
        roots = [inner.root]
        if _STARTS in inner.root.rest:
            return sum(inner.by_name[name].bytes for name in inner.root.operands if name in inner.by_name)
        if inner.root.opcode == "tuple":
            roots = [inner.by_name[operand] for operand in inner.root.operands]
        if len(roots) != len(shapes):
            return sum(shape.bytes for shape in shapes if not shape.near)
        total = 0.0
        for root, shape in zip(roots, shapes, strict=True):
            if shape.near:
                continue
            while root.opcode == "bitcast":
                root = inner.by_name[root.operands[0]]
            if root.opcode == "parameter" or inner.passes(root):
                continue
            update = inner.by_name.get(root.operands[1]) if root.opcode == "dynamic-update-slice" else None
            total += shape.bytes if update is None else min(shape.bytes, update.bytes)
        return total


def _results(one: Instruction, operands: Sequence[Shape]) -> tuple[Shape, ...]:
    """Returns what an instruction makes; the tuple of one that only starts names what it reads besides."""
    if one.opcode == "copy-start":
        return one.shapes[:1]
    if not one.opcode.endswith("-start"):
        return one.shapes
    count = len(operands)
    same = [shape[:2] for shape in one.shapes[:count]] == [shape[:2] for shape in operands]
    return one.shapes[count:] if same else one.shapes


def _near(shapes: list[tuple[Shape, ...]], number: int) -> bool:
    return number < len(shapes) and all(shape.near for shape in shapes[number])


@functools.cache
def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    if not found:
        raise InputError(f"compiled program: unknown type {dtype!r}")
    return int(found[1])


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(size.strip(" <=")) for size in dims.split(",") if size.strip(" <="))
        found.append(Shape(dtype, sizes, "S(" in layout and "S(0)" not in layout))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """Returns the place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if not depth:
                return place + 1
    return len(text)


def _instruction(line: str, head: re.Match[str]) -> Instruction:
    start = head.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    argument = line[opening + 1 : closing - 1]
    opcode = line[end:opening].strip()
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(argument))
    return Instruction(head[2], opcode, _shapes(line[start:end]), operands, line[closing:], argument, bool(head[1]))


def _branches(one: Instruction) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
    if found:
        return _NAME.findall(found[1])
    return [name for key in ("true_computation", "false_computation") if (name := one.attribute(key))]


def _part(where: Computation, name: str, place: int) -> Instruction | None:
    one = where.by_name.get(name)
    if one is None or one.opcode != "tuple" or place >= len(one.operands):
        return None
    return where.by_name.get(one.operands[place])


def _convolution_flops(where: Computation, one: Instruction) -> float:
    """Counts the multiplications that meet an input's value, not padding or the gaps of a dilated one."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    if labels is None:
        raise InputError(f"compiled program: convolution {one.name} has no dim_labels")
    left, right = (where.by_name[operand].shapes[0].dims for operand in one.operands[:2])
    out = one.shapes[0].dims
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1])) if window else {}

    def field(name: str, axis: int, default: str) -> str:
        values = fields[name].split("x") if name in fields else []
        return values[axis] if axis < len(values) else default

    total = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    for axis in range(sum(letter.isdigit() for letter in labels[1])):
        inputs, outputs = left[labels[1].index(str(axis))], out[labels[3].index(str(axis))]
        size, stride = int(field("size", axis, "1")), int(field("stride", axis, "1"))
        low = int(field("pad", axis, "0_0").split("_")[0])
        spread, gap = int(field("lhs_dilate", axis, "1")), int(field("rhs_dilate", axis, "1"))
        total *= _meetings(inputs, outputs, size, stride, low, spread, gap)
    groups = one.attribute("batch_group_count")
    return total / int(groups) if groups else total


@functools.cache
def _meetings(inputs: int, outputs: int, size: int, stride: int, low: int, spread: int, gap: int) -> int:
    """Returns the pairs of an output's place and a tap that meet a value of the input."""
    count, last = 0, (inputs - 1) * spread
    for tap in range(size):
        for place in range(outputs):
            at = place * stride + tap * gap - low
            count += 0 <= at <= last and at % spread == 0
    return count
