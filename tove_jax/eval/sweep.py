"""The runs of a sweep as work for several processes: here, in a Slurm array, or as JobSets.

What is trained, judged and compared, and when a run is done, is `tove_jax.eval.compare`'s; here are only the
commands that each do a part of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tove_jax.config.sweep import Sweep
from tove_jax.errors import InputError
from tove_jax.eval.compare import run_folder, states

_POLL_SECONDS = 0.2


class Task(NamedTuple):
    """A row's run of one seed, and those that are derived of it: no other task waits for them.

    Attributes:
      number: in the sweep, whatever is done.
      rows: names, the row itself first.
      seed: of all of them.
      done: whether all their records count.
    """

    number: int
    rows: tuple[str, ...]
    seed: int
    done: bool

    @property
    def name(self) -> str:
        """The run's name and folder below the sweep's."""
        return f"{self.rows[0]}/seed{self.seed}"


def tasks(sweep: Sweep, workdir: Path | str) -> list[Task]:
    """Returns all work of a sweep, in the order in which `run_sweep` would take it; reads, and writes nothing."""
    done = {(state.row.name, state.seed): state.done for state in states(sweep, workdir)}
    found = []
    for seed in sweep.seeds:
        for row in sweep.rows:
            if not row.of:
                names = (row.name, *(other.name for other in sweep.rows if other.of == row.name))
                found.append(Task(len(found), names, seed, all(done[name, seed] for name in names)))
    return found


def command(task: Task, file: str, workdir: Path | str) -> list[str]:
    """Returns the words that do a task, wherever its folder can be written."""
    rows = ["--rows", *task.rows, "--seeds", str(task.seed)]
    return ["tove", "compare", file, f"--workdir={workdir}", *rows, "--part", "--quiet"]


def slurm_command(
    found: Sequence[Task], words: Sequence[str], launch: Path, at_once: int, options: Sequence[str]
) -> list[str]:
    """Returns the words that put what is not done into Slurm, as one array of jobs of one process each.

    Args:
      found: all tasks.
      words: of `tove sweep`, the same settings; each job takes the task of its number in the array.
      launch: folder of ``slurm.sbatch``.
      at_once: jobs that may run at a time; 0: all.
      options: further ones of sbatch.
    """
    numbers = ",".join(str(task.number) for task in found if not task.done)
    limit = f"%{at_once}" if at_once else ""
    array = ["sbatch", f"--array={numbers}{limit}", "--nodes=1", "--ntasks=1", *options]
    return [*array, str(launch / "slurm.sbatch"), *words, "--array-task"]


def array_task(found: Sequence[Task]) -> Task:
    """Returns the task of this job of a Slurm array.

    Raises:
      InputError: not in an array, or a number that the sweep does not have.
    """
    number = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not number.isdigit() or int(number) >= len(found):
        raise InputError(f"SLURM_ARRAY_TASK_ID: expected a number below {len(found)}, found {number!r}")
    return found[int(number)]


def jobset_command(task: Task, file: str, workdir: Path | str, launch: Path, kind: str) -> list[str]:
    """Returns the words that put a task on a GKE cluster, under a name that stays.

    Args:
      task: what.
      file: the sweep, as the image has it.
      workdir: below the volume that all pods share.
      launch: folder of ``gke/submit.sh``.
      kind: ``tpu`` or ``gpu``.
    """
    return [str(launch / "gke" / "submit.sh"), kind, _set_name(task, workdir), *command(task, file, workdir)]


def _set_name(task: Task, workdir: Path | str) -> str:
    """Returns a name for Kubernetes: small letters, digits and hyphens, 32 at most, cut ones told apart by a hash."""
    full = f"{Path(workdir).name}-{task.rows[0]}-{task.seed}"
    name = "run-" + re.sub(r"[^a-z0-9]+", "-", full.lower()).strip("-")
    return name if len(name) <= 32 else f"{name[:23].rstrip('-')}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def run_local(found: Sequence[Task], file: str, workdir: Path, at_once: int, *, progress: bool = True) -> int:
    """Does what is not done on this machine, some at a time, each in a process of its own.

    What a process says goes into ``log.txt`` in the folder of its run. One that fails does not stop the others. A
    SIGTERM is handed on to all that run, which save; nothing further is begun.

    Args:
      found: all tasks.
      file: of the sweep.
      workdir: of the sweep.
      at_once: processes at a time.
      progress: show a bar.

    Returns:
      0, or the status of the first that failed.
    """
    waiting = [task for task in found if not task.done]
    running: dict[subprocess.Popen[bytes], Task] = {}
    stopping, status = threading.Event(), 0
    before = signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    bar = tqdm(total=len(found), initial=len(found) - len(waiting), desc="sweep", unit="run", disable=not progress)
    try:
        with bar:
            while running or (waiting and not stopping.is_set()):
                while waiting and len(running) < at_once and not stopping.is_set():
                    task = waiting.pop(0)
                    running[_begun(task, file, workdir)] = task
                if stopping.wait(_POLL_SECONDS):
                    for process in running:
                        process.send_signal(signal.SIGTERM)
                    stopping.clear()
                    waiting.clear()
                    status = status or 143
                for process in [process for process in running if process.poll() is not None]:
                    task = running.pop(process)
                    bar.update(process.returncode == 0)
                    if process.returncode:
                        ended = process.returncode if process.returncode > 0 else 128 - process.returncode
                        bar.write(f"sweep: {task.name}: status {ended}, see {_log(task, workdir)}", file=sys.stderr)
                        status = status or ended
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running:
            process.terminate()
    return status


def _log(task: Task, workdir: Path) -> Path:
    return run_folder(workdir, task.rows[0], task.seed) / "log.txt"


def _begun(task: Task, file: str, workdir: Path) -> subprocess.Popen[bytes]:
    path = _log(task, workdir)
    path.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "tove_jax.cli.main", *command(task, file, workdir)[1:]]
    with path.open("ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log)
