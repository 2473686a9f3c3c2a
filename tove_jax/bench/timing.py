"""Timing of sides that take turns, and what is said about a machine beside its numbers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

PACKAGES = ("tove_jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Several times of one thing.

    Attributes:
      median: seconds.
      low, high: quartiles, seconds; the least and the most of fewer than four times.
      runs: how many times.
    """

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the spread of some values, at least one."""
        values = [float(value) for value in values]
        if len(values) < 4:
            return cls(statistics.median(values), min(values), max(values), len(values))
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high, len(values))


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of a comparison.

    Attributes:
      case: what was done; the sides of one case did the same.
      side: who did it.
      seconds: of one time.
      amount: how many pictures, tokens or bytes one time took.
      unit: what `amount` counts.
      ratio: this side's time over the case's first side's, the median over turns; what counts.
      facts: more of it, such as ``compile_s``, ``tflops`` a second, ``mfu``, ``memory_mib``, ``note``, and where the
        device is a processor ``cpu_s`` (see `Turn`) and ``cpu_ratio``, which is to it what ``ratio`` is to ``seconds``.
    """

    case: str
    side: str
    seconds: Spread
    amount: float
    unit: str
    ratio: float
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rate(self) -> float:
        """`amount` a second."""
        return self.amount / self.seconds.median


class Turn(float):
    """Seconds of one turn.

    Attributes:
      cpu: seconds that this process's threads spent on processors in it, which others that want them hardly change.
    """

    cpu: float

    def __new__(cls, seconds: float, cpu: float) -> Turn:
        """Makes the turn's number."""
        made = super().__new__(cls, seconds)
        made.cpu = cpu
        return made


class Clock:
    """How much time is left of a run, or of a part of it.

    Attributes:
      seconds: of the run; 0: as long as it takes.
      began: when, by `time.monotonic`.
    """

    def __init__(self, seconds: float = 0.0, began: float | None = None) -> None:
        self.seconds, self.began = seconds, time.monotonic() if began is None else began

    def until(self, share: float) -> Clock:
        """Returns the clock of what must end when this share of the whole time is spent."""
        return Clock(self.seconds * share, self.began)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - (time.monotonic() - self.began) if self.seconds else float("inf")


def alternate(
    sides: Mapping[str, Callable[[], Any]], turns: int, clock: Clock, *, share: float = 60.0
) -> dict[str, list[Turn]]:
    """Times sides that take turns, so that a change of the machine's load meets all of them.

    Args:
      sides: each does its work once and returns when it is done; called once before, which may compile.
      turns: of each side, at most.
      clock: no turn begins when its time is up; one turn is always taken.
      share: nor after so many seconds of turns.

    Returns:
      Seconds of every turn, as many for each side; the first turn, which warms up, is left out.
    """
    times: dict[str, list[Turn]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    began = time.monotonic()
    for turn in range(turns):
        if turn and (clock.left <= 0 or time.monotonic() - began > share):
            break
        for name, side in sides.items():
            start, cpu = time.perf_counter(), time.process_time()
            side()
            times[name].append(Turn(time.perf_counter() - start, time.process_time() - cpu))
    return times


def rows(
    case: str,
    times: Mapping[str, Sequence[Any]],
    amount: float,
    unit: str,
    facts: Mapping[str, dict[str, Any]] | None = None,
    *,
    flops: float = 0.0,
) -> list[Row]:
    """Makes rows of the times of a case's sides.

    Args:
      case, amount, unit: see `Row`.
      times: of `alternate`; the first side is the one that ratios are to.
      facts: by side.
      flops: operations of one time, counted once, whoever does it; 0: not counted.
    """
    first = next(iter(times.values()))
    found = []
    for side, seen in times.items():
        told = dict((facts or {}).get(side, {}))
        spread = Spread.of(seen)
        if flops:
            told |= figures(flops, spread.median)
        if jax.default_backend() == "cpu" and all(isinstance(turn, Turn) for turn in (*seen, *first)):
            told["cpu_s"] = statistics.median(turn.cpu for turn in seen)
            told["cpu_ratio"] = statistics.median(
                mine.cpu / max(other.cpu, 1e-9) for mine, other in zip(seen, first, strict=True)
            )
        ratio = statistics.median(mine / other for mine, other in zip(seen, first, strict=True))
        found.append(Row(case, side, spread, amount, unit, ratio, told))
    return found


def figures(flops: float, seconds: float) -> dict[str, float]:
    """Returns ``tflops`` a second, and ``mfu`` where the device's peak is known."""
    peak = peak_flops()
    return {"tflops": flops / seconds / 1e12} | ({"mfu": flops / seconds / peak} if peak else {})


def peak_flops() -> float:
    """Returns the published bfloat16 peak of the first device, operations a second; 0 where none is known."""
    from tove_jax.plan.chips import CHIPS

    kind = jax.devices()[0].device_kind
    for chip in CHIPS.values():
        if chip.platform == "cpu":
            continue
        if chip.kind == kind or (chip.platform == "gpu" and kind.startswith(chip.kind.removesuffix(" SXM"))):
            return chip.device.flops
    return 0.0


def compiled_memory(compiled: Any) -> float:
    """Returns MiB that a compiled program holds at its peak, by the compiler: arguments, results and what is between."""
    told = compiled.memory_analysis()
    whole = told.argument_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
    return (whole + told.temp_size_in_bytes) / 2**20


def versions() -> dict[str, str]:
    """Returns the versions of what was measured; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def machine() -> dict[str, Any]:
    """Returns what the numbers were measured on, and how busy it was."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "devices": jax.device_count(),
        "cores": cores(),
        "peak_flops": peak_flops(),
        "load": load(),
    }


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Returns the machine's load over the last minute: processes that want a core; None where it is not told."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
