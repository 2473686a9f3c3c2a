"""A small run's pictures and features, its losses on one device, and a way to start commands in several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import xla_flags
from tests.train.conftest import ROOT, overrides, prepared  # noqa: F401  a fixture
from tove_jax.train.metrics import read_rows

# As in tests/train/test_loop.py: sums over devices round differently, and Adam blows that up where a gradient is zero.
# With a constant rate, a step does not depend on how many there will be.
SETTINGS = [
    "--config.student.adapter.dropout=0.0", "--config.optim.eps=1e-5", "--config.train.keep=9",
    "--config.optim.schedule=constant", "--config.optim.warmup=0.0",
]  # fmt: skip
HOOKED = [sys.executable, str(Path(__file__).parent / "hooked.py")]


def losses(workdir):
    return {row["step"]: row["loss/total"] for row in read_rows(workdir / "metrics.jsonl")}


def records(folder, index, count):
    """Returns what process `index` of `count` was given, batch by batch."""
    return [json.loads(line) for line in (folder / f"{index}-of-{count}.jsonl").read_text().splitlines()]


class Launch:
    """A command started by launch/local.sh; killed with all its processes at the end of a test."""

    def __init__(self, count, command, env, restarts=0):
        launcher = [str(ROOT / "launch/local.sh"), f"--restarts={restarts}", str(count)]
        environment = {
            **os.environ,
            "XLA_FLAGS": xla_flags(env.pop("DEVICES", 1)),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",  # every process would compile it again
            "PYTHONPATH": str(ROOT),
            **env,
        }
        self.process = subprocess.Popen(
            [*launcher, *HOOKED, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, cwd=ROOT,
        )  # fmt: skip

    def wait(self, seconds=600):
        """Returns status, standard output and standard error."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    def pid(self, index):
        """Returns the id of one of the processes."""
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"JAX_PROCESS_ID={index}".encode() in variables:
                return int(child)
        raise AssertionError(f"no process {index}")

    def until(self, condition, seconds=600):
        """Waits for something while the launcher runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.05)

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


@pytest.fixture
def launch(prepared):  # noqa: F811
    """Returns ``launch(count, command, workdir, *overrides, restarts=0, **environment) -> Launch``."""
    started = []

    def start(count, command, workdir, *more, restarts=0, **env):
        words = [command, f"--config={ROOT}/configs/demo.py:smoke", f"--workdir={workdir}"]
        words += overrides(prepared, *SETTINGS, *more)
        started.append(Launch(count, words, env, restarts))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="session")
def single(prepared, tmp_path_factory):  # noqa: F811
    """The folder of a whole run of one process on one device, and what its batches held, under ``records``."""
    workdir = tmp_path_factory.mktemp("single")
    shutil.copytree(prepared / "start", workdir / "start")
    (workdir / "records").mkdir()
    environment = {
        **os.environ,
        "XLA_FLAGS": xla_flags(1),
        "RECORDS": str(workdir / "records"),
        "PYTHONPATH": str(ROOT),
    }
    config = [f"--config={ROOT}/configs/demo.py:smoke", *overrides(prepared, *SETTINGS)]
    command = [*HOOKED, "train", f"--workdir={workdir}", "--quiet", *config]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture
def workdir(prepared, tmp_path):  # noqa: F811
    """A fresh run's folder."""
    shutil.copytree(prepared / "start", tmp_path / "run" / "start")
    (tmp_path / "records").mkdir()
    return tmp_path / "run"
