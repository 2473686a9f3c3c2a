"""Kills a training run and an extraction over and over, and compares what comes out with unbroken ones.

    python -m tests.soak --kills=100                     # one process
    python -m tests.soak --kills=30 --processes=2        # started by launch/local.sh; one of them, or the launcher

Each attempt is ended by a SIGKILL or a SIGTERM and started again, until it is done; then losses must be those of the
unbroken run to the bit, stores those of the unbroken extraction, and no temporary file may be left; then it begins
anew. Most of an attempt is imports, where a kill proves little, so each kill is aimed: at a random moment of a phase
that is drawn by the weights of `AIMS`. Where it fell in truth is read from the folder while the process stands still
(SIGSTOP), and printed. Ends with status 1 when something is not as it should be, and prints tables in Markdown.
Run before a release.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.train.conftest import ROOT, make_pictures, overrides
from tove_jax.errors import InputError
from tove_jax.experts.manifest import FILE_NAME, Manifest
from tove_jax.train.metrics import read_rows

PICTURES, STEPS, EVERY = 96, 80, 20
CONFIG = f"--config={ROOT}/configs/demo.py:smoke"
SETTINGS = [
    f"--config.train.steps={STEPS}", f"--config.train.checkpoint_every={EVERY}", "--config.train.log_every=1",
    "--config.features.shard_records=1", "--config.data.flip=False",
]  # fmt: skip
TEMPORARY = re.compile(r"(\.tmp$|\.old$|\.partial$|\.lock$|__lock$|orbax-checkpoint-tmp|^\.common-)")
SAVING = "*.orbax-checkpoint-tmp"
# Of each command, the phases in their order, and how many of a hundred kills are aimed at each.
AIMS = {
    "extract": {"start-up": 10, "loading an expert": 15, "writing shards": 75},
    "train": {"start-up": 10, "compiling": 15, "steps": 35, "saving": 40},
}
COUNTED = ("writing shards", "steps")
SAVINGS = STEPS / EVERY
# Statuses of `tove` that another start does not mend; a kill must not look like one of them.
OF_ITSELF = (1, 2, 3)


@dataclasses.dataclass
class Attempt:
    """One start of a command, and how far it has come."""

    command: str
    workdir: Path
    features: Path
    log: Path
    began: float = dataclasses.field(default_factory=time.time)
    before: int = 0
    moving: bool = False
    process: subprocess.Popen[bytes] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.before = self.done() if self.command == "extract" else saved(self.workdir)

    @property
    def whole(self) -> int:
        return 2 * PICTURES if self.command == "extract" else STEPS

    def done(self) -> int:
        """Returns how many shards, or steps, there are."""
        if self.command == "extract":
            return sum(1 for _ in self.features.glob("*/shard*.json"))
        path = self.workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def phase(self) -> str:
        if self.command == "extract":
            return self._phase_of_extraction()
        if b"trainable and" not in self.log.read_bytes():
            return "start-up"
        if any(self.workdir.glob(SAVING)) or any(self.workdir.glob(f"checkpoints/{SAVING}")):
            return "saving"
        done = self.done()
        # Rows of steps after the checkpoint are taken away before the first new one comes.
        self.moving = self.moving or done == self.before
        if not self.moving or done == self.before:
            return "compiling"
        return "steps" if done < STEPS else "ending"

    def _phase_of_extraction(self) -> str:
        stores = [path for path in self.features.glob("*") if path.stat().st_mtime > self.began]
        if not stores:
            return "start-up"
        complete = 0
        for manifest in self.features.glob(f"*/{FILE_NAME}"):
            with contextlib.suppress(InputError):
                complete += Manifest.read(manifest.parent).complete
        if complete == 2:
            return "ending"
        newest = max(stores, key=lambda path: path.stat().st_mtime)
        mine = [path for path in newest.glob("shard*.json") if path.stat().st_mtime > self.began]
        self.moving = self.moving or bool(mine)
        return "writing shards" if mine else "loading an expert"


class Soak:
    """One folder with pictures, features, a start, and what unbroken runs leave."""

    def __init__(self, folder: Path, commands: list[str], processes: int, rng: random.Random) -> None:
        self.folder, self.processes, self.rng = folder, processes, rng
        # Command -> phase -> seconds that it takes, in an unbroken run that has nothing to compile.
        self.seconds: dict[str, dict[str, float]] = {}
        self.number = 0
        make_pictures(folder, PICTURES)
        self.features = folder / "features"
        self.unbroken("extract", folder / "whole", self.features)
        self.stored = files(self.features, folder / "whole")
        if "train" in commands:
            self.unbroken("train", folder / "whole", self.features)
            self.losses = losses(folder / "whole")
            assert len(self.losses) == STEPS

    def begin(self, command: str, workdir: Path, features: Path) -> Attempt:
        words = [sys.executable, "-m", "tove_jax.cli.main", command, CONFIG, f"--workdir={workdir}", "--quiet"]
        words += [*overrides(self.folder, *SETTINGS), f"--config.features.path={features}"]
        if self.processes > 1:
            words = [str(ROOT / "launch/local.sh"), "--restarts=0", str(self.processes), *words]
        environment = {
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "TOVE_GRACE_SECONDS": "30",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        self.number += 1
        log = self.folder / "logs" / f"{self.number:04d}-{command}.txt"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as stream:
            attempt = Attempt(command, workdir, features, log)
            attempt.process = subprocess.Popen(
                words, cwd=ROOT, env={**os.environ, **environment}, stdout=stream, stderr=stream, start_new_session=True
            )
        return attempt

    def unbroken(self, command: str, workdir: Path, features: Path) -> None:
        for _ in range(2):  # the second time nothing has to be compiled, as in most attempts
            shutil.rmtree(features if command == "extract" else workdir / "checkpoints", ignore_errors=True)
            (workdir / "metrics.jsonl").unlink(missing_ok=True)
            attempt = self.begin(command, workdir, features)
            seconds: dict[str, float] = collections.defaultdict(float)
            phase, since = attempt.phase(), time.monotonic()
            while attempt.process.poll() is None:
                time.sleep(0.002)
                now = time.monotonic()
                seconds[phase] += now - since
                phase, since = attempt.phase(), now
            assert attempt.process.returncode == 0, attempt.log.read_text()[-2000:]
        self.seconds[command] = dict(seconds)
        told = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        print(f"{command}, unbroken: {told}", file=sys.stderr, flush=True)

    def kill(self, attempt: Attempt) -> dict[str, Any]:
        """Ends an attempt at a random moment; returns the signal, where it fell and how the attempt ended."""
        phases, weights = zip(*AIMS[attempt.command].items(), strict=True)
        aim = self.rng.choices(phases, weights)[0]
        sent = self.rng.choice([signal.SIGKILL, signal.SIGTERM])
        # In steps and shards, which are counted, one of those still to come; else a moment of the phase. Savings come
        # several times in an attempt, each short.
        goal = (
            self.rng.randint(attempt.before + 1, attempt.whole)
            if aim in COUNTED and attempt.before < attempt.whole
            else 0
        )
        times = self.rng.randint(1, 3) if aim == "saving" else 1
        length = 0.05 if goal else self.seconds[attempt.command].get(aim, 1.0) / (SAVINGS if aim == "saving" else 1)
        wait = self.rng.uniform(0, length)
        end = attempt.process
        seen, until = "", None
        while end.poll() is None and (until is None or time.monotonic() < until):
            phase = attempt.phase()
            times -= phase != seen and phase == aim
            there = attempt.done() >= goal and attempt.moving if goal else times <= 0
            if until is None and (there or phase == "ending"):
                until = time.monotonic() + wait
            seen = phase
            time.sleep(0.03 if phase == "start-up" else 0.003)
        if end.poll() is not None:
            return {"phase": "", "signal": "", "status": end.returncode, "aim": aim, "seconds": 0.0}
        with self.standing(attempt) as pids:
            phase = attempt.phase()
            # A SIGTERM comes to the launcher, too, as when a machine is taken away.
            victim = self.rng.choice(pids if sent == signal.SIGKILL else [*pids, end.pid])
            os.kill(victim, sent)
        began = time.monotonic()
        status = end.wait()
        seconds = time.monotonic() - began
        return {"phase": phase, "signal": sent.name, "status": status, "aim": aim, "seconds": seconds}

    @contextlib.contextmanager
    def standing(self, attempt: Attempt) -> Iterator[list[int]]:
        """Holds all processes for a moment; yields their ids."""
        pid = attempt.process.pid
        pids = [pid]
        if self.processes > 1:
            with contextlib.suppress(FileNotFoundError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                pids = [int(child) for child in children] or pids
        for one in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGSTOP)
        try:
            yield pids
        finally:
            for one in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGCONT)


def files(folder: Path, workdir: Path) -> dict[str, bytes]:
    """Returns what is in a folder; a manifest says where its expert's weights lay, which is another folder each time."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes().replace(bytes(workdir), b"") for path in paths}


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    rows = read_rows(workdir / "metrics.jsonl")
    return {row["step"]: {k: v for k, v in row.items() if k.startswith(("loss", "optim"))} for row in rows}


def left_over(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if TEMPORARY.search(path.name)]


def saved(workdir: Path) -> int:
    """Returns the newest whole checkpoint's step."""
    return max((int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()), default=0)


@dataclasses.dataclass
class Found:
    """What became of one command's attempts."""

    kills: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    attempts: int = 0
    late: int = 0
    ended: int = 0
    differ: list[str] = dataclasses.field(default_factory=list)
    temporary: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    longest: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def wrong(self) -> list[str]:
        return [*self.differ, *self.temporary, *self.failed]


def soak(command: str, house: Soak, kills: int, until: float) -> Found:
    """Kills one command until there were enough kills or time is over; the last one is brought to its end."""
    found = Found()
    while sum(found.kills.values()) < kills and time.monotonic() < until:
        workdir = house.folder / f"{command}-{found.ended}"
        features = workdir / "features" if command == "extract" else house.features
        shutil.copytree(house.folder / "whole/start", workdir / "start")
        status = -1
        while status:
            found.attempts += 1
            enough = sum(found.kills.values()) >= kills or time.monotonic() > until
            if house.rng.random() < 0.05:  # another machine: all is compiled again
                shutil.rmtree(house.folder / "jax", ignore_errors=True)
            attempt = house.begin(command, workdir, features)
            told: dict[str, Any]
            if enough:
                told = {"phase": "", "signal": "", "status": attempt.process.wait(), "seconds": 0.0, "aim": ""}
            else:
                told = house.kill(attempt)
            status = told["status"]
            if problem := judge(house, attempt, told):
                found.failed.append(problem)
                return found
            if told["signal"] and status:
                found.kills[told["signal"], told["phase"]] += 1
                found.longest[told["signal"]] = max(found.longest[told["signal"]], told["seconds"])
            found.late += bool(told["signal"] and not status)
            print(
                f"{command} {sum(found.kills.values())}: {told['signal'] or 'no signal'} in {told['phase'] or '-'}, "
                f"aimed at {told['aim'] or '-'}, at {attempt.done()}, status {status} after {told['seconds']:.1f} s",
                file=sys.stderr,
                flush=True,
            )
        found.ended += 1
        same = files(features, workdir) == house.stored if command == "extract" else losses(workdir) == house.losses
        found.differ += [] if same else [f"{workdir}: differs from the unbroken one"]
        found.temporary += left_over(workdir)
        if found.wrong():
            return found
        shutil.rmtree(workdir)
    return found


def judge(house: Soak, attempt: Attempt, told: dict[str, Any]) -> str:
    """Returns what is wrong with an attempt's end; empty when nothing is."""
    status, where = told["status"], f"{attempt.log}: status {told['status']} after {told['signal'] or 'no signal'}"
    if status in OF_ITSELF or (status and not told["signal"]):
        return f"{where}: {attempt.log.read_text()[-1500:]}"
    if b"SIGTERM: saved step" in attempt.log.read_bytes() and saved(attempt.workdir) != attempt.done():
        return f"{where}: {attempt.done()} steps were logged, the newest checkpoint is {saved(attempt.workdir)}"
    if house.processes == 1 and status not in (0, -signal.SIGKILL, -signal.SIGTERM, 143):
        return f"{where}: not how a killed process ends"
    return ""


def report(found: dict[str, Found], house: Soak, seconds: dict[str, float]) -> str:
    lines = [
        "| command | processes | SIGKILL | SIGTERM | came too late | attempts | brought to an end | not as unbroken |"
        " temporary files | failed starts | longest end, s | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for command, one in found.items():
        sums = [sum(n for (name, _), n in one.kills.items() if name == kind) for kind in ("SIGKILL", "SIGTERM")]
        longest = max(one.longest.values(), default=0.0)
        cells = [f"`tove {command}`", house.processes, *sums, one.late, one.attempts, one.ended, len(one.differ)]
        cells += [len(one.temporary), len(one.failed), f"{longest:.1f}", f"{seconds[command]:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| command | processes | where the kill fell | SIGKILL | SIGTERM |", "|---|---|---|---|---|"]
    for command, one in found.items():
        for phase in [*AIMS[command], "ending"]:
            counts = [one.kills[kind, phase] for kind in ("SIGKILL", "SIGTERM")]
            lines.append(f"| `tove {command}` | {house.processes} | {phase} | {counts[0]} | {counts[1]} |")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "orbax-checkpoint"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return "\n".join([*lines, "", f"commit {commit.strip()}, {versions}, Python {platform.python_version()}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="Of each command.")
    parser.add_argument("--minutes", type=float, default=1e9, help="No further kill after this time, for each command.")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", choices=AIMS, help="One of the commands.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    commands = [args.only] if args.only else list(AIMS)
    house = Soak(folder, commands, args.processes, random.Random(args.seed))
    found, seconds = {}, {}
    for command in commands:
        began = time.monotonic()
        found[command] = soak(command, house, args.kills, began + 60 * args.minutes)
        seconds[command] = time.monotonic() - began
    print(report(found, house, seconds), flush=True)
    wrong = [line for one in found.values() for line in one.wrong()]
    if not wrong:
        shutil.rmtree(folder)
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
