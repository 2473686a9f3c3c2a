import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from tove_jax.errors import InputError
from tove_jax.parallel import start, together
from tove_jax.parallel.sharding import batch_share
from tove_jax.parallel.start import SLURM, VARIABLES, Processes, find

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[012-013]", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip


def test_one_process_is_nothing_special():
    assert find(environ={}) == Processes("no cluster in the environment")
    assert find(environ={}).count == 1
    # Asked for, whatever is around.
    assert find(process_count=1, environ=STEP).count == 1
    assert find(environ={**STEP, "JAX_NUM_PROCESSES": "1"}).count == 1
    start.connect(find(environ={}))
    assert not together.several() and together.is_first()


def test_flags_win_over_variables():
    environ = dict(zip(VARIABLES.values(), ("host:1", "4", "2"), strict=True))
    assert find(environ=environ) == Processes("environment", "host:1", 2, 4)
    assert find(process_id=3, environ=environ) == Processes("flags", "host:1", 3, 4)
    assert str(find(environ=environ)) == "process 2 of 4, coordinator host:1 (environment)"


@pytest.mark.parametrize("name", VARIABLES)
def test_the_missing_one_is_named(name):
    environ = dict(zip(VARIABLES.values(), ("host:1", "4", "2"), strict=True))
    del environ[VARIABLES[name]]
    flags = {"process_id": 1} if name == "process_count" else {"process_count": 4}
    flag = "--" + name.replace("_", "-")
    if name == "process_id":
        flags = {"coordinator": "host:1"}
    with pytest.raises(InputError, match=re.escape(f"several processes: {flag} (or {VARIABLES[name]}) missing")):
        find(**flags, environ=environ)


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        ({"coordinator": "host", "process_id": 0, "process_count": 2}, {}, "--coordinator: expected HOST:PORT"),
        ({"coordinator": "host:1", "process_id": 2, "process_count": 2}, {}, "--process-id: expected .* 0 to 1, found 2"),
        ({}, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: expected a whole number, found 'two'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(flags, environ, said):
    with pytest.raises(InputError, match=said):
        find(**flags, environ=environ)


def test_a_slurm_step(monkeypatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    found = find(environ=STEP)
    assert re.fullmatch(r"node012:\d+", found.coordinator)
    assert (found.found, found.index, found.count, found.local_devices) == ("Slurm job 4711", 3, 4, (1,))
    # One task a node has all its devices.
    assert find(environ={**STEP, "SLURM_STEP_NUM_NODES": "4"}).local_devices is None
    assert find(environ={**STEP, "JAX_COORDINATOR_ADDRESS": "other:9"}).coordinator == "other:9"
    assert find(environ={"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}).count == 1


@pytest.mark.parametrize("name", [name for name in SLURM if name not in ("SLURM_JOB_ID", "SLURM_NTASKS")])
def test_a_slurm_job_without_a_step_is_refused(name):
    environ = {key: value for key, value in STEP.items() if key != name}
    with pytest.raises(InputError, match=f"Slurm job 4711 has 4 tasks, but {name} missing: start the command by srun"):
        find(environ=environ)


def test_a_slurm_allocation_of_several_nodes_without_a_step_is_refused():
    with pytest.raises(InputError, match="Slurm job 1 has 4 tasks, but SLURM_NTASKS, SLURM_PROCID"):
        find(environ={"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "4"})


@pytest.fixture
def on_tpu(monkeypatch):
    """As on a TPU host of GKE: JAX believes in its chips, and reads the process's own environment."""
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.BaseTpuCluster, "wait_for_coordinator", lambda *unused: None)

    def get(key):
        import os

        return os.environ.get(key)

    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value", get)

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return variables

    return put


def test_tpu_slices_on_gke(on_tpu):
    hosts = ",".join(f"host-{number}" for number in range(4))
    environ = on_tpu(TPU_WORKER_HOSTNAMES=hosts, TPU_WORKER_ID="2")
    assert find(environ=environ) == Processes("TPU slice on GKE", "host-0:8482", 2, 4)
    environ |= on_tpu(MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID="1", MEGASCALE_COORDINATOR_ADDRESS="first:80")
    assert find(environ=environ) == Processes("TPU slice on GKE", "first:8482", 6, 8)
    for name in ("TPU_WORKER_ID", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"):
        with pytest.raises(InputError, match=f"TPU slice on GKE: {name} missing"):
            find(environ={key: value for key, value in environ.items() if key != name})
    with pytest.raises(InputError, match="MEGASCALE_NUM_SLICES: expected a whole number, found 'two'"):
        find(environ=environ | {"MEGASCALE_NUM_SLICES": "two"})


def test_one_tpu_host_waits_for_nobody(on_tpu):
    job = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    environ = on_tpu(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", **job)
    assert str(find(environ=environ)) == "one process (TPU slice on GKE)"


@pytest.fixture
def metadata(monkeypatch):
    """As on a host of a Cloud TPU slice: what its metadata server would answer, empty for an attribute it lacks."""
    from jax._src.clusters import cloud_tpu_cluster

    answers = {
        "agent-worker-number": "2",
        "worker-network-endpoints": "10.0.0.1,10.0.0.2,10.0.0.3",
        "tpu-env": "x: 'y'",
    }
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.BaseTpuCluster, "wait_for_coordinator", lambda *unused: None)
    monkeypatch.setattr(
        cloud_tpu_cluster,
        "get_metadata",
        lambda name: (answers.get(name, "not found"), 200 if name in answers else 404),
    )
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    return answers


def test_tpu_hosts_by_their_metadata(metadata):
    assert find(environ={}) == Processes("TPU metadata", "10.0.0.1:8482", 2, 3)
    metadata["tpu-env"] = (
        "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:80'"
    )
    assert find(environ={}) == Processes("TPU metadata", "10.0.0.9:8482", 5, 6)
    metadata["tpu-env"] = "MEGASCALE_NUM_SLICES: '2'"
    with pytest.raises(InputError, match="TPU metadata: MEGASCALE_SLICE_ID, MEGASCALE_COORDINATOR_ADDRESS missing"):
        find(environ={})
    del metadata["worker-network-endpoints"]
    with pytest.raises(InputError, match="TPU metadata: worker-network-endpoints, MEGASCALE"):
        find(environ={})


def test_a_pod_of_an_indexed_job_that_was_told_nothing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kubernetes", None)
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    with pytest.raises(InputError, match="JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID missing"):
        find(environ=environ)
    assert find(environ={"KUBERNETES_SERVICE_HOST": "10.0.0.1"}).count == 1


def test_a_pod_that_asks_the_cluster_and_lacks_something(monkeypatch):
    fake = types.SimpleNamespace(
        config=types.SimpleNamespace(load_incluster_config=lambda: None),
        client=types.SimpleNamespace(
            CoreV1Api=lambda: None,
            BatchV1Api=lambda: types.SimpleNamespace(read_namespaced_job=None),
            exceptions=types.SimpleNamespace(ApiException=OSError),
        ),
    )
    monkeypatch.setitem(sys.modules, "kubernetes", fake)
    job = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.delenv("HOSTNAME", raising=False)
    with pytest.raises(InputError, match="several processes: RuntimeError: expected HOSTNAME env"):
        find(environ=job)

    def no_rights():
        raise KeyError("service account")

    fake.config.load_incluster_config = no_rights
    with pytest.raises(InputError, match="several processes: KeyError: 'service account'"):
        find(environ=job)


def test_a_command_for_one_process_is_refused_in_several(monkeypatch, capsys):
    from tove_jax.cli.main import main

    start.require_one("tove compare")
    for name, value in zip(VARIABLES.values(), ("host:1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    root = Path(__file__).parents[2]
    assert main(["compare", f"{root}/configs/sweeps/methods.py"]) == 2
    said = capsys.readouterr().err
    assert "tove compare works in one process, and this is process 1 of 2, coordinator host:1 (environment)" in said
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    start.require_one("tove compare")


def test_all_compile_before_one_begins(monkeypatch):
    """What is compiled anew, for other shapes too, waits for the others once."""
    said = []

    class Jitted:
        def lower(self, *args):
            return types.SimpleNamespace(compile=lambda: said.append("compiled"))

        def __call__(self, *args):
            said.append("called")

    jitted = Jitted()
    assert together.after_all_compiled(jitted) is jitted  # one process has nobody to wait for
    monkeypatch.setattr(together, "several", lambda: True)
    monkeypatch.setattr(together, "barrier", lambda name: said.append("met"))
    call = together.after_all_compiled(jitted)
    call({"w": np.zeros(5)}, {"x": np.zeros(2)})
    assert said == ["compiled", "met", "called"]
    call({"w": np.ones(5)}, {"x": np.ones(2)})
    assert said[3:] == ["called"]
    call({"w": np.zeros(5)}, {"x": np.zeros(3)})
    assert said[4:] == ["compiled", "met", "called"]


def test_differences_name_process_and_field():
    same = {"config.a": "1", "data": "x"}
    assert together.differences({0: same, 1: dict(same)}) == ""
    said = together.differences({0: same, 1: same, 2: {"config.a": "2", "data": "x", "features/clip": "y"}})
    assert said == (
        "the processes do not agree: config.a: process 2 has 2, process 0 has 1; "
        "features/clip: process 2 has y, process 0 has None"
    )
    many = {0: {}, 1: {str(number): "" for number in range(20)}}
    assert together.differences(many).endswith("; and 12 more")


class Device:
    platform, device_kind = "fake", "fake"

    def __init__(self, id, process_index):
        self.id, self.process_index = id, process_index


def mesh_of(sizes, per_process):
    count = int(np.prod(sizes))
    devices = np.array([Device(number, number // per_process) for number in range(count)]).reshape(sizes)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("sizes", "per_process", "shares"),
    [
        ((4, 2, 1), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((4, 1, 2), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),  # a process is a replica's tensor shards
        ((2, 1, 4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes share a replica, and its rows
        ((1, 1, 8), 2, [(0, 1)] * 4),
        ((2, 2, 2), 4, [(0, 2), (1, 2)]),
    ],
)
def test_which_rows_a_process_reads(monkeypatch, sizes, per_process, shares):
    mesh = mesh_of(sizes, per_process)
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        batch_share.cache_clear()
        assert batch_share(mesh) == share
    batch_share.cache_clear()


def test_a_mesh_that_cuts_through_processes_is_refused(monkeypatch):
    batch_share.cache_clear()
    with pytest.raises(InputError, match="two processes share some rows of the batch but not all"):
        batch_share(mesh_of((2, 1, 3), 2))
    batch_share.cache_clear()


def test_an_error_of_a_collective_is_told_from_ones_own(monkeypatch):
    gone = ValueError("UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:3: Connection reset by peer")
    assert not together.is_lost(gone)  # one process has nobody to lose
    monkeypatch.setattr(together, "several", lambda: True)
    assert together.is_lost(gone) and together.is_lost(together.LostError("waited"))
    assert not together.is_lost(ValueError("operands could not be broadcast together"))
