"""Starting one of several processes: what the surroundings say, in one line, and connecting to the others.

Where processes run is found by JAX's own cluster detection (TPU metadata, GKE, Slurm, Kubernetes jobs); ours are the
explicit flags with their environment variables, the checks before JAX waits for anybody, and the words.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

from tove_jax.errors import InputError

#: Environment variable of each flag; a launcher sets them, a flag given by hand wins.
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "process_count": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
#: What a task of a Slurm step has in its environment.
SLURM = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES")
HEARTBEAT = "TOVE_HEARTBEAT_SECONDS"
"""Seconds without a sign of life after which a process counts as dead and the others end; JAX's 100 when unset."""
CONNECT = "TOVE_CONNECT_SECONDS"
"""Seconds in which all processes must have come; JAX's 300 when unset."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
      found: what told so, for people.
      coordinator: ``host:port`` of process 0; empty for one process.
      index: of this process.
      count: of all.
      local_devices: of this machine's accelerators those that this process uses; None: all.
    """

    found: str
    coordinator: str = ""
    index: int = 0
    count: int = 1
    local_devices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.count == 1:
            return f"one process ({self.found})"
        return f"process {self.index} of {self.count}, coordinator {self.coordinator} ({self.found})"


def find(
    coordinator: str | None = None,
    process_id: int | None = None,
    process_count: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Processes:
    """Finds out which of how many processes this is; connects to nobody.

    Flags come first, then the variables of `VARIABLES`, then the cluster that JAX detects: Slurm, a TPU pod or several
    slices (on Google's VMs or GKE), a Kubernetes job. A process count of 1 ends the search.

    Args:
      coordinator: ``host:port`` of process 0.
      process_id: of this process, from 0.
      process_count: of all.
      environ: variables; the process's own when None.

    Raises:
      InputError: a variable that is missing or no number, by name.
    """
    environ = os.environ if environ is None else environ
    given: dict[str, Any] = {"coordinator": coordinator, "process_id": process_id, "process_count": process_count}
    flagged = any(value is not None for value in given.values())
    for name, variable in VARIABLES.items():
        if given[name] is None and environ.get(variable):
            given[name] = environ[variable] if name == "coordinator" else _number(environ, variable)
    if given["process_count"] == 1:
        return Processes("one was asked for")
    if given["process_count"] is None and given["process_id"] is None and not flagged:
        try:
            cluster = _slurm(environ) or _tpu(environ) or _kubernetes(environ)
        except InputError:
            raise
        except Exception as error:  # of JAX's detection many kinds: rights that a pod lacks, words that it cannot read
            raise InputError(f"several processes: {type(error).__name__}: {error}") from error
        if cluster is None:
            return Processes("no cluster in the environment")
        return dataclasses.replace(cluster, coordinator=given["coordinator"] or cluster.coordinator)
    missing = [name for name, value in given.items() if value is None]
    if missing:
        named = " and ".join(f"--{name.replace('_', '-')} (or {VARIABLES[name]})" for name in missing)
        raise InputError(f"several processes: {named} missing")
    if not 0 <= given["process_id"] < given["process_count"]:
        raise InputError(
            f"--process-id: expected a number from 0 to {given['process_count'] - 1}, found {given['process_id']}"
        )
    if not given["coordinator"].rpartition(":")[2].isdigit() or ":" not in given["coordinator"]:
        raise InputError(f"--coordinator: expected HOST:PORT, found {given['coordinator']!r}")
    found = "flags" if flagged else "environment"
    return Processes(found, given["coordinator"], given["process_id"], given["process_count"])


def connect(processes: Processes, environ: Mapping[str, str] | None = None) -> None:
    """Connects to the other processes; before anything else uses JAX. Nothing happens for one process.

    Raises:
      InputError: the others did not come in time, or the coordinator's port cannot be had.
    """
    if processes.count == 1:
        return
    import jax

    environ = os.environ if environ is None else environ
    waits: dict[str, Any] = {
        name: _number(environ, variable)
        for name, variable in (("heartbeat_timeout_seconds", HEARTBEAT), ("initialization_timeout", CONNECT))
        if environ.get(variable)
    }
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            local_device_ids=processes.local_devices,
            cluster_detection_method="deactivate",
            **waits,
        )
    except RuntimeError as error:
        raise InputError(f"{processes}: cannot connect: {str(error).splitlines()[0]}") from error


def start(
    coordinator: str | None = None,
    process_id: int | None = None,
    process_count: int | None = None,
    *,
    alone: bool = False,
) -> Processes:
    """Finds this process's place, connects, and says in one line what was found when there are several.

    Args:
      coordinator: as in `find`.
      process_id: as in `find`.
      process_count: as in `find`.
      alone: several processes work each by itself, as in extraction: none waits for the others or ends with them.

    Raises:
      InputError: as `find` and `connect`.
    """
    processes = find(coordinator, process_id, process_count)
    if not alone:
        connect(processes)
    if processes.count > 1:
        print(f"tove: {processes}", file=sys.stderr, flush=True)
    return processes


def require_one(command: str) -> None:
    """Refuses a command that works in one process where it was started as one of several.

    Args:
      command: its name, for the error.

    Raises:
      InputError: what says that there are several, and what to do; or as `find`.
    """
    processes = find()
    if processes.count > 1:
        raise InputError(
            f"{command} works in one process, and this is {processes}: start it once, with "
            f"{VARIABLES['process_count']}=1 in its environment; for several runs at a time there is `tove sweep`"
        )


def _number(environ: Mapping[str, str], variable: str) -> int:
    try:
        return int(environ[variable])
    except ValueError:
        raise InputError(f"{variable}: expected a whole number, found {environ[variable]!r}") from None


def _slurm(environ: Mapping[str, str]) -> Processes | None:
    """A Slurm step of several tasks; a batch script or a shell in an allocation is one process only if it has one task."""
    # Without a number of tasks there is one a node.
    tasks = environ.get("SLURM_NTASKS") or environ.get("SLURM_JOB_NUM_NODES", "1")
    if "SLURM_JOB_ID" not in environ or tasks == "1":
        return None
    job = f"Slurm job {environ['SLURM_JOB_ID']}"
    if missing := [name for name in SLURM if name not in environ]:
        raise InputError(
            f"{job} has {tasks} tasks, but {', '.join(missing)} missing: start the command by srun, "
            "or say --process-count=1"
        )
    from jax._src.clusters import SlurmCluster

    # One task a node has all its accelerators; several share them one by one, which is JAX's rule for every case.
    several = _number(environ, "SLURM_NTASKS") > _number(environ, "SLURM_STEP_NUM_NODES")
    return Processes(
        job,
        SlurmCluster.get_coordinator_address(None, environ.get("JAX_COORDINATOR_PORT")),
        _number(environ, "SLURM_PROCID"),
        _number(environ, "SLURM_NTASKS"),
        (_number(environ, "SLURM_LOCALID"),) if several else None,
    )


def _tpu(environ: Mapping[str, str]) -> Processes | None:
    """Hosts of one TPU slice or of several."""
    import jax  # noqa: F401  looks for TPU chips as it is imported
    from jax._src.clusters import cloud_tpu_cluster as tpu

    if tpu.GkeTpuCluster.is_env_present():
        cluster: Any = tpu.GkeTpuCluster
        needed = ["TPU_WORKER_ID"]
        if environ.get("MEGASCALE_NUM_SLICES") and _number(environ, "MEGASCALE_NUM_SLICES") > 1:
            needed += ["MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"]
        if missing := [name for name in needed if not environ.get(name)]:
            raise InputError(f"TPU slice on GKE: {', '.join(missing)} missing")
        found = "TPU slice on GKE"
    elif tpu.GceTpuCluster.is_env_present():
        cluster, found = tpu.GceTpuCluster, "TPU metadata"
        attributes = ("agent-worker-number", "worker-network-endpoints")
        missing = [name for name in attributes if tpu.get_metadata(name)[1] != tpu.metadata_response_code_success]
        if int(tpu.get_tpu_env_value("MEGASCALE_NUM_SLICES") or 1) > 1:
            slices = ("MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
            missing += [name for name in slices if not tpu.get_tpu_env_value(name)]
        if missing:
            raise InputError(f"TPU metadata: {', '.join(missing)} missing")
    else:
        return None
    count = cluster.get_process_count()
    if count == 1:
        return Processes(found)  # and not, on GKE, a job that nobody told about the others
    waiting = _number(environ, CONNECT) if environ.get(CONNECT) else 300
    address = cluster.get_coordinator_address(waiting, environ.get("JAX_COORDINATOR_PORT"))
    return Processes(found, address, cluster.get_process_id(), count)


def _kubernetes(environ: Mapping[str, str]) -> Processes | None:
    """A pod of an indexed job, by the cluster's API, where the manifest sets none of `VARIABLES`."""
    if "KUBERNETES_SERVICE_HOST" not in environ or "JOB_COMPLETION_INDEX" not in environ:
        return None
    try:
        import kubernetes  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            f"Kubernetes job, pod {environ['JOB_COMPLETION_INDEX']}: {', '.join(VARIABLES.values())} missing; set them "
            "as launch/gke does, or install the package kubernetes for JAX to ask the cluster"
        ) from None
    from jax._src.clusters import K8sCluster

    K8sCluster.is_env_present()
    count = K8sCluster.get_process_count()
    if count == 1:
        return None
    address = K8sCluster.get_coordinator_address(300, environ.get("JAX_COORDINATOR_PORT"))
    return Processes("Kubernetes job", address, K8sCluster.get_process_id(), count)
