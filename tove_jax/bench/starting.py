"""How long `tove train` takes from the start of its process to the end of its first step, cold and warm."""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import tove_jax
from tove_jax.bench import cases as steps
from tove_jax.bench.feeding import jpeg, write_features
from tove_jax.bench.sections import Case, Scale, Unmeasured, bound
from tove_jax.bench.timing import Clock, Row, Spread
from tove_jax.config import to_json
from tove_jax.config.schema import Config
from tove_jax.data.folder import FolderSource
from tove_jax.files.compiled import VARIABLE
from tove_jax.files.weights import hash_arrays
from tove_jax.hf.start import start_folder
from tove_jax.train.initial import start_parameters
from tove_jax.train.started import Start
from tove_jax.train.state import flatten

WARM = 3
"""Starts with compiled programs, at most."""
LIMIT = 1800.0
"""Seconds after which a run that has not ended is stopped."""
_TAIL = 20
_CONFIG = "from tove_jax.config import from_json, thaw\n\n\ndef get_config(argument=''):\n    return thaw(from_json({!r}, 'bench'))\n"  # fmt: skip


class Started(NamedTuple):
    """One start.

    Attributes:
      seconds: from before the process began to the line that says that its first step is done.
      cpu: seconds on processors until then, of all its threads; None where the system does not tell.
      told: what the process itself said.
    """

    seconds: float
    cpu: float | None
    told: Start


def start_cases(scale: Scale, folder: str | None = None) -> list[Case]:
    """Returns the starts, one a size.

    Args:
      scale: ``starts`` and dtype are read.
      folder: in which weights, features and runs are written; None: the system's temporary one.
    """
    found = []
    for size, batch in scale.starts:
        name = f"move_kd {size} batch {batch} {scale.dtype}, adapters train"
        found.append(Case(name, bound(_start, name, size, batch, scale.dtype, folder)))
    return found


def _start(name: str, size: str, batch: int, dtype: str, folder: str | None, clock: Clock) -> list[Row]:
    """Starts a run with an empty cache of compiled programs, and more of them with what it left there."""
    side = steps.SIZES[size]["image_size"] // steps.SIZES[size]["patch_size"]
    config = steps.config_of("move_kd", size, batch=batch, dtype=dtype, codec=f"pool:{side}+int8,clip=bf16")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        prepare(config, place)
        cold = start(place, clock)
        warm: list[Started] = []
        while not warm or (len(warm) < WARM and clock.left > 0):
            try:
                warm.append(start(place, clock))
            except Unmeasured:
                if not warm or clock.left > 0:
                    raise
    return [_row(name, "cache empty", [cold], cold), _row(name, "cache warm", warm, cold)]


def prepare(config: Config, folder: Path) -> None:
    """Writes all that a run of drawn numbers needs: ``config.py``, pictures, a student's start and features.

    Args:
      config: the settings; what they say of places and steps is replaced.
      folder: empty.
    """
    weights = start_folder(config, folder)
    (folder / "pictures").mkdir()
    files = [jpeg(number) for number in range(4)]
    for number in range(2 * max(4, config.train.batch)):
        (folder / "pictures" / f"{number:04d}.jpg").write_bytes(files[number % len(files)])
    config = dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, initialize=str(weights)),
        data=dataclasses.replace(config.data, path=str(folder / "pictures"), held_out=0.0),
        features=dataclasses.replace(config.features, path=str(folder / "features")),
        train=dataclasses.replace(config.train, steps=1),
    )
    (folder / "features").mkdir()
    hashes = {"clip": hash_arrays(flatten(start_parameters(config, folder)))}
    write_features(folder / "features", config, list(FolderSource(str(folder / "pictures")).ids), hashes)
    (folder / "config.py").write_text(_CONFIG.format(to_json(config)))


def start(folder: Path, clock: Clock) -> Started:
    """Runs `tove train` in a process and a run's folder of its own; what it compiled stays in the folder's ``cache``.

    Args:
      folder: of `prepare`.
      clock: the process is stopped when its time is up.

    Raises:
      Unmeasured: no time was left, or training failed; with the end of what it wrote.
    """
    workdir = folder / "run"
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    paths = [str(Path(tove_jax.__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tove_jax.cli.main", "train", f"--config={folder / 'config.py'}", "--quiet"]
    found: Started | None = None
    lines: deque[str] = deque(maxlen=_TAIL)
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
    )
    timer = threading.Timer(max(0.0, min(LIMIT, clock.left)), process.kill)
    timer.start()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if found is None and (told := Start.parse(line)) is not None:
                found = Started(time.perf_counter() - began, _cpu_seconds(process.pid), told)
        status = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        shutil.rmtree(workdir, ignore_errors=True)
    if found is None and clock.left <= 0:
        raise Unmeasured("out of time")
    if found is None or (status and clock.left > 0):
        last = lines[-1].strip() if lines else "it said nothing"
        raise Unmeasured(f"tove train ended with status {status}: {last}", "".join(lines))
    return found


def _row(case: str, side: str, starts: list[Started], first: Started) -> Row:
    """Returns the starts of one side as a row; `first` is of the case's first side."""
    spread = Spread.of([one.seconds for one in starts])
    facts: dict[str, Any] = {}

    def middle(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    cpu = middle([one.cpu for one in starts])
    if cpu is not None and first.cpu:
        facts |= {"cpu_s": cpu, "cpu_ratio": cpu / first.cpu}
    facts["compile_s"] = middle([one.told.compiling for one in starts])
    facts["read_s"] = middle([one.told.reading for one in starts])
    facts["step_s"] = middle([one.told.step for one in starts])
    if facts["step_s"] is not None:
        facts["note"] = f"{facts['read_s']:.1f} s reading compiled programs, {facts['step_s']:.1f} s the step itself"
    return Row(case, side, spread, 1, "starts", spread.median / first.seconds, facts)


def _cpu_seconds(pid: int) -> float | None:
    """Returns what a process has spent on processors so far, in its own code and in the system's."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return None
