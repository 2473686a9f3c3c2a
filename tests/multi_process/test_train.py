"""Training by several processes on this machine, through launch/local.sh: the losses, the data, and every way to end."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.multi_process.conftest import losses, records

# Sums over processes are taken in another order than on one device; six steps of it.
TOLERANCE = {"rtol": 2e-5}
# Seconds in which the others end when one is killed; docs/reliability.md has what was measured.
BOUND = 60


def assert_losses(workdir, single):
    wanted = losses(single)
    found = losses(workdir)
    assert list(found) == list(wanted)
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), **TOLERANCE)


def test_two_then_four_then_one(launch, workdir, single, tmp_path):
    """Two processes; four go on from the middle with shards of the parameters, one of them slow; one ends it."""
    two = launch(2, "train", workdir, "--quiet", RECORDS=str(tmp_path / "records"))
    status, _, err = two.wait()
    assert status == 0, err
    assert re.search(r"tove: process 1 of 2, coordinator 127.0.0.1:\d+ \(environment\)", err)
    assert err.count("mesh {'data': 2, 'fsdp': 1, 'tensor': 1}") == 1
    assert_losses(workdir, single)
    whole = records(single / "records", 0, 1)
    halves = zip(*(records(tmp_path / "records", index, 2) for index in range(2)), strict=True)
    assert [sum(parts, []) for parts in halves] == whole

    for later in ("4", "6"):
        shutil.rmtree(workdir / "checkpoints" / later)
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    four = launch(4, "train", workdir, "--quiet", *mesh, SLOW="2:0.3", RECORDS=str(tmp_path / "records"))
    status, _, err = four.wait()
    assert status == 0, err
    assert "resumed at step 2" in err
    assert_losses(workdir, single)
    quarters = zip(*(records(tmp_path / "records", index, 4) for index in range(4)), strict=True)
    assert [sum(parts, []) for parts in quarters] == whole[2:]

    shutil.rmtree(workdir / "checkpoints" / "6")
    status, _, err = launch(1, "train", workdir, "--quiet").wait()
    assert status == 0 and "resumed at step 4" in err
    assert_losses(workdir, single)


def test_one_is_killed_and_all_start_again(launch, workdir, single, tmp_path):
    """Process 0 stands before batch 4, and the checkpoint of step 2 is whole, when process 1 is killed."""
    # The launcher would not end the other one before the test is given up.
    env = {"HOLD": "0:4", "RELEASE": str(tmp_path / "go"), "TOVE_GRACE_SECONDS": "600"}
    run = launch(2, "train", workdir, "--quiet", restarts=1, **env)
    run.until((workdir / "checkpoints" / "2").exists)
    left = run.pid(0)
    os.kill(run.pid(1), signal.SIGKILL)
    (tmp_path / "go").touch()
    run.until(lambda: not Path(f"/proc/{left}").exists(), seconds=BOUND)
    status, _, err = run.wait()
    assert status == 0, err
    told = r"process 0: stopped, perhaps since another process is gone|distributed service detected"
    assert re.search(told, err), err
    assert err.count("starting again") == 1 and "resumed at step 2" in err, err
    assert_losses(workdir, single)


@pytest.mark.slow  # for its 40 seconds
def test_one_that_comes_late_is_waited_for(launch, workdir, single):
    """Longer than the half minute in which Gloo wants to have connected; as when it has more to compile."""
    status, _, err = launch(2, "train", workdir, "--quiet", LATE="1:40").wait()
    assert status == 0, err
    assert_losses(workdir, single)


def test_a_sigterm_stops_all_after_the_same_step(launch, workdir, single, tmp_path):
    """One of them gets it; both save the same step and end, and the launcher's next start goes on from there."""
    many = ["--config.train.checkpoint_every=100", "--config.train.steps=40"]
    env = {"SLOW": "1:0.3", "RELEASE": str(tmp_path / "go")}
    run = launch(2, "train", workdir, "--quiet", *many, restarts=1, **env)
    run.until(lambda: len(losses(workdir)) >= 6)
    os.kill(run.pid(1), signal.SIGTERM)
    run.until(lambda: saved(workdir), seconds=BOUND)
    (tmp_path / "go").touch()
    status, _, err = run.wait()
    assert status == 0, err
    (step,) = saved(workdir) - {40}
    assert f"SIGTERM: saved step {step}, stopped" in err and f"resumed at step {step}" in err, err
    assert "a process ended with status 143" in err and err.count("starting again") == 1, err
    found = losses(workdir)
    assert list(found) == list(range(1, 41))
    np.testing.assert_allclose([found[number] for number in range(1, 7)], list(losses(single).values()), **TOLERANCE)


def saved(workdir):
    return {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}


def test_processes_that_disagree_do_not_begin(launch, workdir, prepared, tmp_path):
    shutil.copytree(prepared / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures/label0/00.png").unlink()
    differ = f"--config.optim.lr=0.5 --config.data.path={tmp_path / 'pictures'}"
    status, _, err = launch(2, "train", workdir, "--quiet", DIFFER_1=differ).wait()
    assert status == 2
    for number in range(2):
        said = (
            f"process {number}: the processes do not agree: config.optim.lr: process 1 has 0.5, process 0 has 0.002; "
        )
        assert re.search(said + r"data: process 1 has 23 pictures, ids \w+, process 0 has 24 pictures, ids \w+", err), (
            err
        )
    assert not (workdir / "metrics.jsonl").exists()


def test_one_that_cannot_begin_ends_all_with_its_reason(launch, workdir, tmp_path):
    run = launch(2, "train", workdir, "--quiet", DIFFER_1=f"--config.features.path={tmp_path / 'nowhere'}")
    status, _, err = run.wait()
    assert status == 2
    assert re.search(r"tove: stopped with process 1, which said: .*no features of expert 'clip'", err)


@pytest.mark.slow
def test_one_that_hangs_is_given_up(launch, workdir):
    """Stopped, not killed: its connections stay open, so only the missing heartbeat tells."""
    run = launch(2, "train", workdir, "--quiet", SLOW="0:0.3", TOVE_HEARTBEAT_SECONDS="10", TOVE_GRACE_SECONDS="5")
    run.until(lambda: len(losses(workdir)) >= 1)
    hanging = run.pid(1)
    os.kill(hanging, signal.SIGSTOP)
    began = time.monotonic()
    status, _, err = run.wait()
    assert status not in (0, 143) and time.monotonic() - began < 120
    assert "heartbeat" in err or "distributed service detected" in err or "is gone" in err, err
