"""Where compiled programs are kept from one run to the next."""

from __future__ import annotations

import hashlib
import os
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep_compiled(environment: MutableMapping[str, str] = os.environ, cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Turns on JAX's cache of compiled programs, unless the environment says where it is, or is empty: none.

    The folder is in the user's cache (XDG_CACHE_HOME) and has the processor's features in its name: homes are shared
    between machines, and a program for another processor may hold instructions that this one lacks. Programs that
    compile in less than a tenth of a second are not kept, unless the environment says how long; JAX's own rule is a
    second, and a start has several below it. Call it before JAX is imported.

    Args:
      environment: changed in place.
      cpuinfo: tells the processor's features; without it they are left out of the name.
    """
    if VARIABLE in environment:
        return
    base = Path(environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    told = "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    environment.setdefault(LEAST, "0.1")
    environment[VARIABLE] = str(base / "tove_jax" / f"compiled-{hashlib.sha256(told.encode()).hexdigest()[:8]}")
