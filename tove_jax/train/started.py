"""What a process needed until its first training step was done, told once, on stderr."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

import tove_jax

# JAX's own clocks: of coming by a program, compiled or kept from before; of reading one that was kept.
_HAD = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_retrieval_time_sec"
_START_FIELD = 19
"""Of what follows the name in /proc/PID/stat (proc_pid_stat(5)): clock ticks from boot to the process's start."""
_FIRST = "train: first step done"


class Start(NamedTuple):
    """Seconds of a start; None where JAX tells no more than the first.

    Attributes:
      whole: from the start of the process to the end of its first step.
      compiling: of them, spent on compiling.
      reading: of them, spent on reading programs that were compiled before.
      step: of them, since the last program was there: the step itself, and dispatching another one if there is.
    """

    whole: float
    compiling: float | None = None
    reading: float | None = None
    step: float | None = None

    def __str__(self) -> str:
        """Returns a line for people."""
        text = f"{_FIRST} {self.whole:.1f} s after the start"
        if self.compiling is None:
            return text
        return (
            f"{text}: {self.compiling:.1f} s compiling, {self.reading:.1f} s reading compiled programs, "
            f"{self.step:.1f} s the step itself"
        )

    @classmethod
    def parse(cls, line: str) -> Start | None:
        """Reads what `__str__` wrote; None where a line says something else."""
        if not line.startswith(_FIRST):
            return None
        return cls(*(float(number) for number in re.findall(r"([\d.]+) s\b", line)))


class _Compiling:
    """Sums up what JAX tells of compiling."""

    def __init__(self) -> None:
        self.seconds = {_HAD: 0.0, _READ: 0.0}
        self.last: float | None = None
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **more: Any) -> None:
        del more
        if event in self.seconds:
            self.seconds[event] += duration_secs
            self.last = time.monotonic()


_compiling: _Compiling | None = None
_told = False


def watch() -> None:
    """Counts what compiling takes, from now on."""
    global _compiling
    _compiling = _compiling or _Compiling()


def tell() -> None:
    """Says once a process that the first step is done, and what it took; call it when the step has ended."""
    global _told
    if _told:
        return
    _told = True
    start = Start(process_seconds())
    if _compiling is not None and _compiling.last is not None:
        had, read = (_compiling.seconds[event] for event in (_HAD, _READ))
        start = Start(start.whole, max(had - read, 0.0), read, time.monotonic() - _compiling.last)
    tqdm.write(str(start), file=sys.stderr)


def process_seconds() -> float:
    """Returns the seconds since this process began; where that is not told, since `tove_jax` was imported."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic() - tove_jax.IMPORTED
