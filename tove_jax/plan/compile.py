"""Compiles a run's step for chips that are not there, in a process of its own, and reads what it would take."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tove_jax.config import from_json, to_json
from tove_jax.config.schema import Config
from tove_jax.errors import InputError
from tove_jax.plan.chips import Topology, parse

if TYPE_CHECKING:
    import jax

_MARK = "tove plan: "


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device.

    Attributes:
      trainable, frozen, optimiser, experts, batch: what the step is given, by kind, as sharded.
      padding: what the chip's layout adds to them.
      gradients: of the trainable parameters, as sharded; part of `temporaries`.
      temporaries: activations, gathered weights, gradients: everything the step makes and drops.
      code: of the program.
      limit: of the device.
      estimated: the temporaries are those of a compiler for processors, which keeps half precision as float32.
    """

    trainable: int
    frozen: int
    optimiser: int
    experts: int
    batch: int
    padding: int
    gradients: int
    temporaries: int
    code: int
    limit: int
    estimated: bool

    @property
    def total(self) -> int:
        """All of it."""
        given = self.trainable + self.frozen + self.optimiser + self.experts + self.batch
        return given + self.padding + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        """Whether it is below the limit."""
        return self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What was read of a compiled step, for one device unless said.

    Attributes:
      memory: by kind; None where the compiler gave up for want of it.
      needed: bytes that the compiler said it needs, where it gave up.
      roofline: `tove_jax.plan.roofline.Roofline` as a dict; None with `memory`.
      model_flops: operations of a step on all devices, without what is computed again (`remat`).
      step_flops: the same, with it.
      batch_bytes: of a global batch, on the host.
      feature_bytes: of these, features read from a store.
      compile_s: seconds to lower and compile.
      profile: `tove_jax.plan.profile.Profile` as a dict; None with `memory`.
    """

    memory: Memory | None
    needed: int
    roofline: dict[str, Any] | None
    model_flops: float
    step_flops: float
    batch_bytes: int
    feature_bytes: int
    compile_s: float
    profile: dict[str, Any] | None = None


def compile_step(config: Config, topology: Topology, *, length: int | None = None) -> Compiled:
    """Compiles in a child process, so that this one needs neither TPU's library nor many fake devices.

    Args:
      config: a whole run's settings; ``mesh`` is the mesh that is compiled for.
      topology: to compile for.
      length: tokens of a row of text; None: the longest that the settings allow.

    Raises:
      InputError: settings that do not fit each other or the topology; TPU's library is not installed; the
        compiler failed.
    """
    request: dict[str, Any] = {"config": to_json(config), "topology": _spelt(topology)}
    request |= {"slices": topology.slices, "length": length}
    environment = {**os.environ, **environment_of(topology)}
    done = subprocess.run(
        [sys.executable, "-m", "tove_jax.plan.compile"],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    answers = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not answers:
        tail = "\n".join(done.stderr.strip().splitlines()[-12:])
        note = library_note() if topology.chip.platform == "tpu" else ""
        raise InputError(f"the compiler's process ended with status {done.returncode}:\n{tail}{note}")
    answer = json.loads(answers[-1])
    if "error" in answer:
        raise InputError(answer["error"])
    memory = answer.pop("memory")
    return Compiled(memory=None if memory is None else Memory(**memory), **answer)


def library_note() -> str:
    """Returns what to say when TPU's library is not of the version that this jax was released with; nothing if it is."""
    wanted = [
        re.fullmatch(r"libtpu==([\d.]+)\*.*", line.replace(" ", ""))
        for line in importlib.metadata.requires("jax") or ()
    ]
    release = next((match[1] for match in wanted if match), None)
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return ""
    if release is None or f"{found}.".startswith(release):
        return ""
    return (
        f"\nlibtpu {found} is installed, jax {importlib.metadata.version('jax')} was released with {release}*, and one may "
        "not understand the other: pip install 'tove_jax[plan]'"
    )


def _spelt(topology: Topology) -> str:
    return f"{topology.chip.name}:" + "x".join(map(str, topology.shape))


def environment_of(topology: Topology) -> dict[str, str]:
    """Returns the environment variables of a process that compiles for a topology."""
    chosen = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "2"}
    # Programs for chips that are not there cannot be read back from the cache, and the time to compile is reported.
    chosen["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if topology.chip.platform == "tpu":
        # The library asks the machine what it is, unless told.
        types = {"v5e": "v5litepod", "v6e": "v6e", "v5p": "v5p", "tpu7x": "tpu7x"}
        chosen |= {
            "TPU_ACCELERATOR_TYPE": f"{types[topology.chip.name]}-{topology.chips * topology.chip.named}",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling takes no chip, so others may compile too
            "TPU_MIN_LOG_LEVEL": "3",
            "TPU_STDERR_LOG_LEVEL": "3",
        }
    else:
        chosen["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={topology.devices}"
    return chosen


def find_devices(topology: Topology) -> Sequence[Any]:
    """Returns devices to compile for, in the environment that `compile_step` makes.

    Raises:
      InputError: TPU's library is not installed, or knows no such topology.
    """
    import jax

    if topology.chip.platform != "tpu":
        return jax.devices("cpu")[: topology.devices]
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"{topology.name}: TPU's compiler is not installed; pip install 'tove_jax[plan]', in an environment of its "
            "own, since ordinary runs warn with it"
        )
    from jax.experimental import topologies

    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=_spelt(topology), **slices).devices
    except Exception as error:  # of the library's own kinds
        raise InputError(f"{topology.name}: TPU's library refuses it: {str(error).splitlines()[0]}") from error


def places_of(mesh: jax.sharding.Mesh, topology: Topology) -> list[Any]:
    """Returns where every device of a mesh lies, in its order."""
    from tove_jax.plan.roofline import Place

    per_node = topology.devices // topology.slices
    found = []
    for number, device in enumerate(mesh.devices.flat):
        if topology.chip.platform == "tpu":
            coords = tuple(device.coords)[: len(topology.shape)]
            found.append(Place(getattr(device, "slice_index", None) or 0, coords))
        else:
            found.append(Place(number // per_node))
    return found


def compiled_here(config: Config, topology: Topology, *, length: int | None = None) -> Compiled:
    """Compiles in this process, whose environment must fit; see `compile_step`."""
    from tove_jax.experts.flops import flops
    from tove_jax.parallel import run_mesh
    from tove_jax.plan.abstract import abstract_run, lower, on_mesh, tree_bytes
    from tove_jax.plan.hlo import Program
    from tove_jax.plan.profile import profile
    from tove_jax.plan.roofline import roofline

    mesh = run_mesh(config, find_devices(topology))
    run = abstract_run(config, length)
    step_flops = flops(run.step, run.state, run.batch, run.experts)
    plain = abstract_run(without_remat(config), length)
    model_flops = flops(plain.step, plain.state, plain.batch, plain.experts)
    began = time.perf_counter()
    facts: dict[str, Any] = {
        "model_flops": model_flops,
        "step_flops": step_flops,
        "batch_bytes": tree_bytes(run.batch),
        "feature_bytes": tree_bytes(run.batch["features"]),
    }
    lowered = lower(config, run, mesh)
    try:
        compiled = lowered.compile()
    except Exception as error:
        given = sum(tree_bytes(tree, sharded=True) for tree in on_mesh(config, run, mesh))
        needed = needed_memory(str(error), given)
        if not needed:
            raise
        seconds = time.perf_counter() - began
        return Compiled(memory=None, needed=needed, roofline=None, compile_s=seconds, **facts)
    seconds = time.perf_counter() - began
    state, batch, experts = on_mesh(config, run, mesh)
    kinds = {
        "trainable": tree_bytes(state.trainable, sharded=True),
        "frozen": tree_bytes(state.frozen, sharded=True),
        "optimiser": tree_bytes(state.opt_state, sharded=True),
        "experts": tree_bytes(experts, sharded=True),
        "batch": tree_bytes(batch, sharded=True),
    }
    told = compiled.memory_analysis()
    memory = Memory(
        **kinds,
        padding=max(0, told.argument_size_in_bytes - sum(kinds.values())),
        gradients=kinds["trainable"],
        temporaries=told.temp_size_in_bytes,
        code=told.generated_code_size_in_bytes,
        limit=topology.chip.device.memory,
        estimated=topology.chip.platform != "tpu",
    )
    program = Program(compiled.as_text())
    found = roofline(
        program,
        topology,
        places_of(mesh, topology),
        scattered=topology.chip.platform != "tpu",
    )
    told_roofline = {**dataclasses.asdict(found), "step_s": found.step_s, "bound": found.bound}
    told_profile = dataclasses.asdict(profile(program, topology.chip.device))
    return Compiled(
        memory=memory,
        needed=memory.total,
        roofline=told_roofline,
        compile_s=seconds,
        profile=told_profile,
        **facts,
    )


def without_remat(config: Config) -> Config:
    """Returns the settings with nothing computed again."""
    return dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, remat="none"),
        language=dataclasses.replace(config.language, remat="none"),
    )


def needed_memory(text: str, given: int) -> int:
    """Returns the bytes that an error of TPU's compiler says are needed; 0 where it is about something else.

    Args:
      text: the error, which tells of all memory, or of temporaries alone.
      given: bytes of what the step is given, which are added to the latter.
    """
    whole = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", text)
    temporaries = re.search(r"required for HLO temporaries \(([\d.]+)([KMG])\) exceeds", text)
    found = whole or temporaries
    if found is None:
        return 0
    told = int(float(found[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]])
    return told if whole else told + given


def _main() -> int:
    request = json.loads(sys.stdin.read())
    try:
        config = from_json(request["config"], "tove plan")
        topology = parse(request["topology"], request["slices"])
        found = compiled_here(config, topology, length=request["length"])
        answer = dataclasses.asdict(found)
    except InputError as error:
        answer = {"error": str(error)}
    print(_MARK + json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
