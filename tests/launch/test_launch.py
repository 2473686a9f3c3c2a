"""The launchers: what they would run, that shells and Kubernetes take it, and that they start again when they should."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *LAUNCH.glob("gke/*.sh")])
# Arguments with everything that a shell could take apart.
COMMAND = ["tove", "train", "--config=a b.py", """--config.optim.groups=(('x/.*', 1.0), ("y", None))"""]


def run(script, *words, status=0, **env):
    done = subprocess.run(
        [str(LAUNCH / script), *map(str, words)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([tool, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def manifest(kind, *command, **env):
    yaml = pytest.importorskip("yaml")
    out, _ = run("gke/submit.sh", "--dry-run", kind, "demo-1", *(command or COMMAND), **env)
    return yaml.safe_load(out)


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_manifests_meet_the_schema(kind):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())
    found = manifest(kind, IMAGE="registry/tove:1", HOSTS="3", RESTARTS="7")
    validator = jsonschema.Draft202012Validator(schema)
    assert not [error.message for error in validator.iter_errors(found)]
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 3
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert pod["containers"][0]["command"] == COMMAND and pod["containers"][0]["image"] == "registry/tove:1"
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    # The schema is able to say no.
    pod["containers"][0]["imag"] = "x"
    assert list(validator.iter_errors(found))


def test_pods_with_gpus_are_told_who_they_are():
    from tove_jax.parallel.start import find

    found = manifest("gpu", HOSTS="2")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    variables = {one["name"]: one.get("value", "1") for one in found["containers"][0]["env"]}
    processes = find(environ=variables)
    assert (processes.coordinator, processes.index, processes.count) == ("demo-1-node-0-0.demo-1:6002", 1, 2)


def test_submitting_needs_an_image_and_a_fit_name():
    assert "IMAGE is missing" in run("gke/submit.sh", "tpu", "demo", "tove", status=2, IMAGE="")[1]
    assert "usage" in run("gke/submit.sh", "--dry-run", "tpu", "De_mo", "tove", status=2)[1]


def test_local_says_what_it_would_run():
    out, _ = run("local.sh", "--dry-run", "--port=1234", 2, "tove", "train")
    assert out.splitlines() == [
        f"env JAX_COORDINATOR_ADDRESS=127.0.0.1:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={number} tove train"
        for number in range(2)
    ]
    assert "usage" in run("local.sh", "tove", status=2)[1]


# Ends with the next status of a list that is kept in a file.
STEPS = 'read -r first rest <<<"$(cat "$0")"; echo "$rest" >"$0"; exit "$first"'


@pytest.mark.parametrize(
    ("launcher", "statuses", "restarts", "ended"),
    [
        ("local.sh", "75 0", 1, 0),
        ("local.sh", "75 75 0", 1, 75),
        ("local.sh", "2 0", 9, 2),
        ("again.sh", "143 137 0", 2, 0),
        ("again.sh", "3 0", 9, 3),
    ],
)
def test_only_what_may_end_otherwise_is_started_again(tmp_path, launcher, statuses, restarts, ended):
    (tmp_path / "statuses").write_text(statuses)
    begin = [f"--restarts={restarts}", 1] if launcher == "local.sh" else [restarts]
    command = ["bash", "-c", STEPS, tmp_path / "statuses"]
    _, err = run(launcher, *begin, *command, status=ended, TOVE_PAUSE_SECONDS="0")
    assert err.count("starting again") == len(statuses.split()) - len((tmp_path / "statuses").read_text().split()) - 1


@pytest.mark.parametrize(("command", "status"), [("true", 0), ("exit 7", 7)])
def test_processes_whose_end_was_noted_already_are_not_waited_for_for_ever(command, status):
    """After signals bash may not wait for the next of processes that have ended; it remembers how they did."""
    noted = """() { if [[ $1 == -n ]]; then sleep 0.3; unset ended; return 127; fi; builtin wait "$@"; }"""
    done = subprocess.run(
        [str(LAUNCH / "local.sh"), "--restarts=0", "2", "bash", "-c", command],
        capture_output=True, text=True, cwd=ROOT, timeout=30, env={**os.environ, "BASH_FUNC_wait%%": noted},
    )  # fmt: skip
    assert done.returncode == status, done.stderr


def test_those_that_are_left_are_killed_after_a_while():
    script = '[ "$JAX_PROCESS_ID" = 0 ] && exit 9; sleep 100'
    began = time.monotonic()
    run("local.sh", "--restarts=0", 2, "bash", "-c", script, status=9, TOVE_GRACE_SECONDS="1")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("words", [["local.sh", "2"], ["again.sh", "5"]], ids=lambda words: words[0])
def test_a_sigterm_is_handed_on_and_waited_for(tmp_path, words):
    script = (
        f'trap "sleep 0.3; touch {tmp_path}/saved; exit 143" TERM; touch {tmp_path}/on; while :; do sleep 0.1; done'
    )
    process = subprocess.Popen([str(LAUNCH / words[0]), *words[1:], "bash", "-c", script], stderr=subprocess.DEVNULL)
    while not (tmp_path / "on").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143 and (tmp_path / "saved").exists()


def test_slurm_runs_the_command_by_srun():
    out, _ = run("slurm.sbatch", "--dry-run", "tove", "train")
    assert out.split() == ["srun", "--wait=120", "--kill-on-bad-exit=0", "tove", "train"]


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (75, True), (2, False), (0, False)])
def test_slurm_puts_a_job_that_was_stopped_back(tmp_path, status, requeued):
    for name, text in (("srun", f"exit {status}"), ("scontrol", f"echo $* >{tmp_path}/said")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    run("slurm.sbatch", "tove", status=status, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="12")
    assert (tmp_path / "said").exists() == requeued
    if requeued:
        assert (tmp_path / "said").read_text() == "requeue 12\n"
        (tmp_path / "said").unlink()
        more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "50"}
        run("slurm.sbatch", "tove", status=status, **more)
        assert not (tmp_path / "said").exists()


def test_a_tpu_slice_is_made_filled_and_started():
    up = run("tpu_vm.sh", "--dry-run", "up", "pod", SPOT="1", ZONE="here")[0].splitlines()
    words = [shlex.split(line) for line in up]
    assert words[0][:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "pod"]
    assert "--spot" in words[0] and all("--zone=here" in line for line in words if line[0] == "gcloud")
    assert words[1][:2] == ["git", "archive"] and words[2][4] == "scp" and "--worker=all" in words[2]
    (line,) = run("tpu_vm.sh", "--dry-run", "run", "pod", *COMMAND)[0].splitlines()
    (remote,) = (word for word in shlex.split(line) if word.startswith("--command="))
    assert "--worker=all" in shlex.split(line)
    # What the worker's shell makes of it is the command again.
    begin = remote.index("launch/again.sh 20 ") + len("launch/again.sh 20 ")
    assert shlex.split(remote[begin : remote.index(" >>")]) == COMMAND
    assert "kill -TERM" in run("tpu_vm.sh", "--dry-run", "stop", "pod")[0].replace("\\", "")
    assert "usage" in run("tpu_vm.sh", "up", status=2)[1]


def test_a_tpu_slice_that_is_there_is_used_again_and_one_taken_away_made_anew(tmp_path):
    (tmp_path / "gcloud").write_text(
        f'#!/bin/bash\n[[ $4 == describe ]] && cat {tmp_path}/state && exit\necho "$4" >>{tmp_path}/said\n'
    )
    (tmp_path / "gcloud").chmod(0o755)
    for state, wanted in (("READY", ["scp", "ssh"]), ("PREEMPTED", ["delete", "create", "scp", "ssh"])):
        (tmp_path / "state").write_text(state)
        (tmp_path / "said").unlink(missing_ok=True)
        run("tpu_vm.sh", "up", "pod", PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert (tmp_path / "said").read_text().split() == wanted
