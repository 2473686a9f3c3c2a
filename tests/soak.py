"""Kills a training run and an extraction over and over, and compares what comes out with unbroken ones.

    python -m tests.soak --kills=100                     # one process
    python -m tests.soak --kills=20 --processes=2        # started by launch/local.sh; one of them is killed

Each attempt is ended at a random moment by a SIGKILL or a SIGTERM and started again, until it is done; then losses
must be those of the unbroken run to the bit, stores those of the unbroken extraction, and no temporary file may be
left; then it begins anew. Prints a row for each, and ends with status 1 when one is not so. Run before a release.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.train.conftest import ROOT, make_pictures, overrides
from tove_jax.train.metrics import read_rows

STEPS = 24
CONFIG = f"--config={ROOT}/configs/demo.py:smoke"
SETTINGS = [
    f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=4", "--config.train.log_every=1",
    "--config.features.shard_records=2", "--config.data.flip=False",
]  # fmt: skip
TEMPORARY = re.compile(r"(\.tmp$|\.old$|\.partial$|\.lock$|orbax-checkpoint-tmp|^\.common-)")


class Soak:
    """One folder with pictures, features, a start, and what unbroken runs leave."""

    def __init__(self, folder: Path, processes: int, rng: random.Random) -> None:
        self.folder, self.processes, self.rng = folder, processes, rng
        self.seconds: dict[str, float] = {}
        make_pictures(folder)
        self.features = folder / "features"
        self.go("extract", folder / "whole", self.features)
        self.stored = files(self.features)
        self.go("train", folder / "whole", self.features)
        self.losses = losses(folder / "whole")
        assert len(self.losses) == STEPS

    def begin(self, command: str, workdir: Path, features: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "tove_jax.cli.main", command, CONFIG, f"--workdir={workdir}", "--quiet"]
        words += [*overrides(self.folder, *SETTINGS), f"--config.features.path={features}"]
        if self.processes > 1:
            words = [str(ROOT / "launch/local.sh"), "--restarts=0", str(self.processes), *words]
        flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu", "TOVE_GRACE_SECONDS": "30"}
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                words, cwd=ROOT, env={**os.environ, **flags, **cache}, stdout=log, stderr=log, start_new_session=True
            )

    def go(self, command: str, workdir: Path, features: Path) -> None:
        for _ in range(2):  # the second time nothing has to be compiled, which is how long an attempt takes
            shutil.rmtree(features if command == "extract" else workdir / "checkpoints", ignore_errors=True)
            (workdir / "metrics.jsonl").unlink(missing_ok=True)
            began = time.monotonic()
            status = self.begin(command, workdir, features).wait()
            assert status == 0, (self.folder / "log.txt").read_text()[-2000:]
            self.seconds[command] = time.monotonic() - began

    def attempt(self, command: str, workdir: Path, features: Path) -> str:
        """Begins, ends it at a random moment; returns the signal's name, or ``done`` when it was faster."""
        process = self.begin(command, workdir, features)
        sent = self.rng.choice([signal.SIGKILL, signal.SIGTERM])
        try:
            status = process.wait(self.rng.uniform(0.05, 1.1) * self.seconds[command])
        except subprocess.TimeoutExpired:
            os.kill(self.victim(process), sent)
            status = process.wait()
            if status:
                return sent.name
        assert status == 0, (self.folder / "log.txt").read_text()[-2000:]
        return "done"

    def victim(self, process: subprocess.Popen[bytes]) -> int:
        """Returns the process, or one of those that the launcher started."""
        if self.processes == 1:
            return process.pid
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return int(self.rng.choice(children)) if children else process.pid


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    rows = read_rows(workdir / "metrics.jsonl")
    return {row["step"]: {k: v for k, v in row.items() if k.startswith(("loss", "optim"))} for row in rows}


def left_over(*folders: Path) -> list[str]:
    return [str(path) for folder in folders for path in folder.rglob("*") if TEMPORARY.search(path.name)]


def soak(command: str, house: Soak, kills: int, until: float) -> dict[str, object]:
    """Kills one command until there were enough kills or time is over; the last one is brought to its end."""
    counts = {"SIGKILL": 0, "SIGTERM": 0, "done": 0}
    wrong: list[str] = []
    while counts["SIGKILL"] + counts["SIGTERM"] < kills and time.monotonic() < until:
        workdir = house.folder / f"{command}-{counts['done']}"
        features = workdir / "features" if command == "extract" else house.features
        shutil.copytree(house.folder / "whole/start", workdir / "start")
        ended = ""
        while ended != "done":
            if counts["SIGKILL"] + counts["SIGTERM"] >= kills or time.monotonic() > until:
                assert house.begin(command, workdir, features).wait() == 0
                ended = "done"
            else:
                ended = house.attempt(command, workdir, features)
            counts[ended] += 1
            print(f"{command}: {counts}", file=sys.stderr, flush=True)
        same = files(features) == house.stored if command == "extract" else losses(workdir) == house.losses
        wrong += [] if same else [f"{workdir}: differs from the unbroken one"]
        wrong += left_over(workdir)
        if not wrong:
            shutil.rmtree(workdir)
    return {**counts, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="Of each command.")
    parser.add_argument("--minutes", type=float, default=1e9, help="No further kill after this time, for each command.")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    house = Soak(folder, args.processes, random.Random(args.seed))
    print("| command | processes | SIGKILL | SIGTERM | brought to an end | not as unbroken | temporary files left |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failed = False
    for command in ("extract", "train"):
        found = soak(command, house, args.kills, time.monotonic() + 60 * args.minutes)
        wrong = found["wrong"]
        differ = sum("differs" in line for line in wrong)
        cells = [f"`tove {command}`", args.processes, found["SIGKILL"], found["SIGTERM"], found["done"], differ]
        print("| " + " | ".join(map(str, [*cells, len(wrong) - differ])) + " |", flush=True)
        print("\n".join(wrong), file=sys.stderr)
        failed |= bool(wrong)
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
