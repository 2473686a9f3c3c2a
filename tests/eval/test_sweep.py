"""Sweeps as work for several processes: what is left, the commands, and that runs at a time do not meet."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.eval.test_compare import SWEEP, House
from tove_jax.cli.main import main
from tove_jax.config.sweep import Row
from tove_jax.errors import InputError
from tove_jax.eval import compare, sweep
from tove_jax.experts.extract import claim

ROOT = Path(__file__).parents[2]


@pytest.fixture
def partly(tmp_path):
    """A folder in which one run is done."""
    assert House().go(tmp_path, SWEEP.only(["more"], [2])) == 0
    return tmp_path


def test_work_is_numbered_whatever_is_done(partly):
    found = sweep.tasks(SWEEP, partly)
    assert [task.name for task in found] == [
        f"{row}/seed{seed}" for seed in (1, 2) for row in ("plain", "more", "most")
    ]
    assert [task.number for task in found] == list(range(6))
    assert [task.number for task in found if task.done] == [4]


def test_derived_rows_go_with_the_run_they_are_made_of():
    derived = Row("less", SWEEP.rows[0].config, "plain", "plain", ("hed",))
    whole = compare.Sweep((*SWEEP.rows, derived), (1,), "plain")
    found = sweep.tasks(whole, "nowhere")
    assert [task.rows for task in found] == [("plain", "less"), ("more",), ("most",)]


def test_a_task_is_a_part_of_a_comparison(partly):
    task = sweep.tasks(SWEEP, partly)[1]
    words = sweep.command(task, "file.py:x", partly)
    assert words == ["tove", "compare", "file.py:x", f"--workdir={partly}", "--rows", "more", "--seeds", "1", "--part", "--quiet"]  # fmt: skip


def test_as_a_slurm_array(partly, monkeypatch):
    found = sweep.tasks(SWEEP, partly)
    words = sweep.slurm_command(found, ["tove", "sweep", "f.py"], Path("launch"), 2, ["--gpus=1"])
    assert words == [
        "sbatch", "--array=0,1,2,3,5%2", "--nodes=1", "--ntasks=1", "--gpus=1",
        "launch/slurm.sbatch", "tove", "sweep", "f.py", "--array-task",
    ]  # fmt: skip
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    assert sweep.array_task(found).name == "most/seed2"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "6")
    with pytest.raises(InputError, match="SLURM_ARRAY_TASK_ID: expected a number below 6, found '6'"):
        sweep.array_task(found)


def test_as_jobsets(partly):
    found = sweep.tasks(SWEEP, partly)
    words = sweep.jobset_command(found[0], "f.py", "/shared/Methods 1", ROOT / "launch", "tpu")
    assert words[1:3] == ["tpu", "run-methods-1-plain-1"]
    assert subprocess.run([words[0], "--dry-run", *words[1:]], capture_output=True, check=True).stdout
    names = {sweep._set_name(task, "/shared/a-folder-with-quite-a-long-name") for task in found}
    assert len(names) == 6 and max(map(len, names)) <= 32


def test_parts_of_one_folder_do_not_meet(tmp_path):
    house = House()

    def part(rows, seeds):
        return compare.run_sweep(
            SWEEP.only(rows, seeds), tmp_path, train=house.train, evaluate=house.evaluate, extract=house.extract,
            ground=house.ground, progress=False, part=True,
        )  # fmt: skip

    (tmp_path / "plain" / "seed1").mkdir(parents=True)
    with claim(tmp_path / "plain" / "seed1" / "run.lock"):
        with pytest.raises(InputError, match="plain/seed1: another process is at work here"):
            part(["plain"], [1])
        with pytest.raises(InputError, match="another process is at work here"):
            house.go(tmp_path)
        assert part(["more"], [1]) == 0
    assert part(["plain", "most"], [1]) == 0 and part([], [2]) == 0
    assert all(state.done for state in compare.states(SWEEP, tmp_path))
    assert not list(tmp_path.rglob("*.lock"))
    assert compare.read_references(SWEEP, tmp_path)["eval/majority"] == 0.5


@pytest.fixture
def program(monkeypatch):
    """Gives tasks another program: a Python line, told the task's name and folder."""

    def give(line):
        def begun(task, file, workdir):
            path = sweep._log(task, workdir)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as log:
                return subprocess.Popen([sys.executable, "-c", line, task.name, str(workdir)], stderr=log, stdout=log)

        monkeypatch.setattr(sweep, "_begun", begun)

    return give


def test_some_run_at_a_time_and_one_that_fails_stops_none(partly, program, capsys):
    program(
        "import sys, time, pathlib\n"
        "name, folder = sys.argv[1], pathlib.Path(sys.argv[2])\n"
        "mark = folder / name.replace('/', '-'); mark.touch(); time.sleep(0.8)\n"
        "print(len(list(folder.glob('*-seed*')), ), 'at a time')\n"
        "mark.unlink(); sys.exit(3 if name == 'plain/seed2' else 0)"
    )
    found = sweep.tasks(SWEEP, partly)
    assert sweep.run_local(found, "f.py", partly, 2, progress=False) == 3
    assert f"sweep: plain/seed2: status 3, see {partly}/plain/seed2/log.txt" in capsys.readouterr().err
    logs = {path.parent.parent.name + path.parent.name: path.read_text() for path in partly.rglob("log.txt")}
    assert len(logs) == 5 and "moreseed2" not in logs
    assert {int(text.split()[0]) for text in logs.values()} <= {1, 2} and "2 at a time" in "".join(logs.values())


def test_a_sigterm_is_handed_on_and_nothing_further_is_begun(partly, program):
    program(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
        "print('on', flush=True); time.sleep(60)"
    )

    def stop():
        while not any("on" in path.read_text() for path in partly.rglob("log.txt")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert sweep.run_local(sweep.tasks(SWEEP, partly), "f.py", partly, 1, progress=False) == 143
    thread.join()
    assert [path.read_text() for path in partly.rglob("log.txt")] == ["on\nsaved\n"]


def test_the_command_lists_what_is_left_and_ends_with_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tove_jax.config.sweep.from_sweep_file", lambda path: SWEEP)
    words = ["sweep", "f.py", f"--workdir={tmp_path}"]
    assert House().go(tmp_path, SWEEP.only(["more"], [2])) == 0
    assert main([*words, "--dry-run"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "# 1 of 6 runs are done" and len(lines) == 5
    assert shlex.split(lines[0])[:3] == ["tove", "compare", "f.py"]
    assert main([*words, "--dry-run", "--slurm", "--at-once=3", "--sbatch=--gpus=1 --time=1:00"]) == 0
    assert "--array=0,1,2,3,5%3" in capsys.readouterr().out
    assert main([*words, "--dry-run", "--gke=gpu"]) == 0
    assert capsys.readouterr().out.count("launch/gke/submit.sh gpu run-") == 5
    assert main([*words, "--slurm", "--gke=tpu"]) == 2
    capsys.readouterr()
    assert House().go(tmp_path) == 0
    assert main(words) == 0
    assert (tmp_path / "compare.svg").exists() and "plain" in capsys.readouterr().out
