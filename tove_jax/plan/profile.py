"""Where a compiled step's time goes, by the roofline: its instructions in groups, by the source they come from.

An instruction's name in the source is the one that the compiler kept; of a fused instruction that is one of many, so
what is fused into a product, such as a bias, a norm's sum or an activation, counts with the product.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tove_jax.plan.chips import Chip
from tove_jax.plan.hlo import Computation, Instruction, Program

# First match over "direction|opcode|source" wins.
_GROUPS: tuple[tuple[str, str], ...] = (
    ("kept for the backward pass", r".*(dynamic_update_index_in_dim|dynamic_index_in_dim)"),
    ("copies and layout", r"\w+\|(copy|copy-start|slice-start|transpose|reshape|pad)\|"),
    ("language model", r".*\blanguage\b(?!.*projector)"),
    ("losses and targets", r".*\bmethod\b"),
    ("features and experts", r".*\b(features|experts)\b"),
    ("optimiser", r".*\boptimiser\b"),
    ("attention, projections", r".*attention/(query|key|value|out)/"),
    ("attention, maps", r".*attention/"),
    ("adapters", r".*mlp/adapter/(?!fc[12]/)"),
    ("MLP", r".*/mlp/"),
    ("norms", r".*/(norm\d?|pre_norm|post_norm)(/|$)"),
    ("student, the rest", r".*VisionTransformer"),
)
DIRECTIONS = ("forward", "backward", "again")


@dataclasses.dataclass(frozen=True)
class Line:
    """One instruction of the program, or the sum of a group.

    Attributes:
      name: where it comes from.
      direction: ``forward``, ``backward``, or ``again`` for what the backward pass computes again; of a group all.
      count: how often it runs in a step.
      seconds: of all runs, by `Program.seconds`.
      flops: operations in products and convolutions.
      bytes: to and from main memory.
      result: type and sizes of its result; empty for a group.
    """

    name: str
    direction: str
    count: float
    seconds: float
    flops: float
    bytes: float
    result: str = ""


@dataclasses.dataclass(frozen=True)
class Profile:
    """The largest groups and instructions of a step, collectives left out.

    Attributes:
      groups: all of them, the longest first.
      instructions: the longest.
    """

    groups: tuple[Line, ...]
    instructions: tuple[Line, ...]


def profile(program: Program, chip: Chip, largest: int = 20) -> Profile:
    """Reads where a step's time goes.

    Args:
      program: of one device.
      chip: a device's figures.
      largest: instructions to name.
    """
    lines: list[Line] = []
    groups: dict[tuple[str, str], list[float]] = {}
    for computation, times in program.runs():
        for one in computation.instructions:
            flops, moved = program.flops(computation, one), program.bytes(computation, one)
            seconds = times * program.seconds(computation, one, chip.flops, chip.bandwidth)
            if not seconds:
                continue
            source = source_of(program, computation, one)
            direction = direction_of(source)
            line = Line(
                _short(source) or one.opcode, direction, times, seconds, times * flops, times * moved, _told(one)
            )
            lines.append(line)
            sums = groups.setdefault((group_of(one, source), direction), [0.0] * 4)
            for place, value in enumerate((times, seconds, line.flops, line.bytes)):
                sums[place] += value
    found = [Line(name, direction, a, b, c, d) for (name, direction), (a, b, c, d) in groups.items()]
    return Profile(tuple(_longest_first(found)), tuple(_longest_first(lines)[:largest]))


def _longest_first(lines: Sequence[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: -line.seconds)


def read(found: Mapping[str, Any]) -> Profile:
    """Returns a profile of what `dataclasses.asdict` made of it."""
    groups, instructions = (tuple(Line(**line) for line in found[part]) for part in ("groups", "instructions"))
    return Profile(groups, instructions)


def source_of(program: Program, computation: Computation, one: Instruction) -> str:
    """Returns the name in the source that the compiler kept; of one without, that of what it is made of or reads."""
    seen = [one]
    if one.opcode == "fusion" and (inner := program.inner(one)):
        seen += [inner.root, *reversed(inner.instructions)]
    seen += [computation.by_name[name] for name in one.operands if name in computation.by_name]
    for instruction in seen:
        found = re.search(r'op_name="([^"]*)"', instruction.rest)
        if found and "/" in found[1]:
            return found[1]
    return ""


def direction_of(source: str) -> str:
    """Returns the direction of a name in the source."""
    if "rematted_computation" in source:
        return "again"
    return "backward" if "transpose(" in source else "forward"


def group_of(one: Instruction, source: str) -> str:
    """Returns an instruction's group."""
    target = re.search(r'custom_call_target="([^"]*)"', one.rest)
    text = f"{direction_of(source)}|{one.opcode}{':' + target[1] if target else ''}|{source}"
    return next((name for name, pattern in _GROUPS if re.match(pattern, text)), "the rest")


def table(found: Profile, total: float, instructions: int = 12) -> str:
    """Returns a profile as text.

    Args:
      found: of `profile`.
      total: seconds of the step, of which shares are given.
      instructions: how many to print.
    """
    names = dict.fromkeys(line.name for line in found.groups)
    rows = [(name, [line for line in found.groups if line.name == name]) for name in names]
    rows.sort(key=lambda row: -_total(row[1], "seconds"))
    lines = ["where it goes, by the roofline", f"  {'ms':>9s} {'share':>6s} {'TFLOP':>8s} {'GB':>8s}  group"]
    for name, parts in rows:
        split = ", ".join(
            f"{direction} {1e3 * seconds:.1f}"
            for direction in DIRECTIONS
            if (seconds := _total([part for part in parts if part.direction == direction], "seconds"))
        )
        lines.append(_line(parts, total) + f"  {name} ({split})")
    lines += ["", "the longest instructions"]
    for line in found.instructions[:instructions]:
        lines.append(f"{_line([line], total)}  {line.name}, {line.direction}, {line.count:.0f} times, {line.result}")
    return "\n".join(lines)


def _line(parts: Sequence[Line], total: float) -> str:
    seconds, flops, moved = (_total(parts, name) for name in ("seconds", "flops", "bytes"))
    share = seconds / total if total else 0.0
    return f"  {1e3 * seconds:9.2f} {share:6.1%} {flops / 1e12:8.3f} {moved / 1e9:8.2f}"


def _total(parts: Sequence[Line], name: str) -> float:
    return sum(getattr(part, name) for part in parts)


def _short(source: str) -> str:
    """Returns a name in the source without the marks of transformations and loops."""
    kept = re.sub(r"(?:transpose|jvp|jit|vmap|checkpoint|shard_map)\(([^()]*(?:\([^()]*\))?[^()]*)\)", r"\1", source)
    skipped = {"step", "while", "body", "closed_call", "checkpoint", "rematted_computation", ""}
    parts = [
        part
        for part in re.split(r"/", re.sub(r"[()]", "", re.sub(r"(transpose|jvp)", "", kept)))
        if part not in skipped
    ]
    return "/".join(dict.fromkeys(parts))


def _told(one: Instruction) -> str:
    shapes = [f"{shape.dtype}[{','.join(map(str, shape.dims))}]" for shape in one.shapes if shape.dims]
    return " ".join(dict.fromkeys(shapes)) or "scalar"
