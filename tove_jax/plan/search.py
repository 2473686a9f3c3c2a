"""Meshes that a run can take on a topology, which of them is best, and what mends a run that does not fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from tove_jax.config.schema import Config
from tove_jax.errors import InputError
from tove_jax.parallel.mesh import common_heads, fit_sizes, rows_at_once
from tove_jax.plan.chips import Topology
from tove_jax.plan.compile import Compiled, compile_step

Compile = Callable[..., Compiled]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One compiled way to run.

    Attributes:
      changes: settings that differ from the run's own, as on the command line.
      config: with them.
      compiled: what came of it.
    """

    changes: tuple[str, ...]
    config: Config
    compiled: Compiled

    @property
    def fits(self) -> bool:
        """Whether it fits in memory."""
        return self.compiled.memory is not None and self.compiled.memory.fits

    @property
    def images_a_second(self) -> float:
        """Pictures a second by the roofline; 0 where it did not compile."""
        found = self.compiled.roofline
        return self.config.train.batch / found["step_s"] if found else 0.0


def sizes(config: Config, topology: Topology) -> tuple[int, int, int]:
    """Returns the sizes of the run's mesh on a topology.

    Raises:
      InputError: they do not multiply to the devices, or the batch does not divide; a mesh that does is named.
    """
    why = ""
    try:
        data, fsdp, tensor = fit_sizes(
            config.mesh, topology.devices, topology.slices, rows=rows_at_once(config), heads=common_heads(config)
        )
    except InputError as error:
        why = f"; {error}"
    else:
        slices = topology.slices if topology.chip.platform == "tpu" else 1
        if rows_at_once(config) % (data * fsdp) == 0 and data % slices == 0:
            return data, fsdp, tensor
    found = next(meshes(config, topology), None)
    cure = "no mesh does; change train.batch or train.accumulation"
    if found is not None:
        cure = "one that does: " + " ".join(changes(config, mesh=found))
    mesh = config.mesh
    raise InputError(
        f"mesh data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor} does not fit {topology.name} with "
        f"{topology.devices} devices, train.batch {config.train.batch} and train.accumulation "
        f"{config.train.accumulation}{why}; {cure}"
    )


def meshes(config: Config, topology: Topology) -> Iterator[tuple[int, int, int]]:
    """Yields (data, fsdp, tensor) that the topology, the batch and the heads allow; most shards by fsdp first."""
    devices, rows, heads = topology.devices, rows_at_once(config), common_heads(config)
    slices = topology.slices if topology.chip.platform == "tpu" else 1
    for tensor in (size for size in range(1, 17) if heads % size == 0 and devices % size == 0):
        rest = devices // tensor
        for fsdp in (size for size in range(rest, 0, -1) if rest % size == 0):
            data = rest // fsdp
            if rows % rest == 0 and data % slices == 0:
                yield data, fsdp, tensor


def changes(config: Config, **settings: Any) -> tuple[str, ...]:
    """Returns settings as on the command line, those that differ alone.

    Args:
      config: to compare with.
      **settings: ``mesh`` sizes, ``remat``, ``accumulation``, ``batch``.
    """
    found: list[str] = []
    if "mesh" in settings:
        for name, size in zip(("data", "fsdp", "tensor"), settings["mesh"], strict=True):
            if getattr(config.mesh, name) != size:
                found.append(f"--config.mesh.{name}={size}")
    for name in ("batch", "accumulation"):
        if settings.get(name, getattr(config.train, name)) != getattr(config.train, name):
            found.append(f"--config.train.{name}={settings[name]}")
    if "remat" in settings:
        sections = ("student", "language") if config.language.kind != "none" else ("student",)
        for section in sections:
            if getattr(config, section).remat != settings["remat"]:
                found.append(f"--config.{section}.remat={settings['remat']}")
    return tuple(found)


def changed(config: Config, **settings: Any) -> Config:
    """Returns the settings with some of `changes` made."""
    train = {name: settings[name] for name in ("batch", "accumulation") if name in settings}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    if "mesh" in settings:
        config = with_mesh(config, settings["mesh"])
    if "remat" in settings:
        student = dataclasses.replace(config.student, remat=settings["remat"])
        language = dataclasses.replace(config.language, remat=settings["remat"])
        config = dataclasses.replace(config, student=student, language=language)
    return config


def with_mesh(config: Config, found: tuple[int, int, int]) -> Config:
    """Returns the settings with these sizes of data, fsdp and tensor."""
    data, fsdp, tensor = found
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor))


def mend(
    config: Config,
    topology: Topology,
    *,
    tries: int = 4,
    length: int | None = None,
    compile: Compile = compile_step,
    told: Callable[[str], None] = lambda line: None,
) -> list[Trial]:
    """Tries what makes a run fit, the cheapest first, until one does.

    First more is computed again (``remat``), then the batch is cut into pieces (``train.accumulation``), then
    parameters are split further (``mesh``), each together with those before.

    Args:
      config: that did not fit.
      topology: to compile for.
      tries: compilations at most.
      length: see `compile_step`.
      compile: as `compile_step`.
      told: called with each try's changes.

    Returns:
      The tries in their order; the last one fits, unless none did.
    """
    options: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    if changes(config, remat="full"):
        settings["remat"] = "full"
        options.append(dict(settings))
    shards = math.prod(sizes(config, topology)[:2])
    for pieces in (2, 4, 8, 16):
        accumulation = config.train.accumulation * pieces
        if config.train.batch % (accumulation * shards) == 0:
            settings["accumulation"] = accumulation
            options.append(dict(settings))
    now = sizes(config, topology)
    rest = {name: value for name, value in settings.items() if name != "accumulation"}
    further = [mesh for mesh in meshes(config, topology) if mesh[1] * mesh[2] > now[1] * now[2]]
    options += [{**rest, "mesh": mesh} for mesh in sorted(further, key=lambda mesh: (mesh[2], mesh[1]))]
    return _try(config, topology, options[:tries], length, compile, told, until_fits=True)


def search(
    config: Config,
    topology: Topology,
    *,
    tries: int = 6,
    length: int | None = None,
    compile: Compile = compile_step,
    told: Callable[[str], None] = lambda line: None,
) -> list[Trial]:
    """Compiles for the meshes that move the least, and doubles the batch of the best.

    Meshes are put in order by `traffic`; the batch is doubled while the run fits and pictures a second rise by more
    than a fiftieth.

    Args:
      config: of the run; its mesh is not read.
      topology: to compile for.
      tries: compilations at most; a third of them are kept for batches.
      length: see `compile_step`.
      compile: as `compile_step`.
      told: called with each try's changes.

    Returns:
      The tries, those that fit first, by pictures a second.

    Raises:
      InputError: no mesh fits the batch.
    """
    parameters = parameter_counts(config)
    known = sorted(meshes(config, topology), key=lambda mesh: traffic(config, mesh, parameters))
    if not known:
        raise InputError(
            f"--search: no mesh on {topology.name} divides train.batch {config.train.batch} and "
            f"train.accumulation {config.train.accumulation}"
        )
    for_meshes = max(1, tries - tries // 3)
    options = [{"mesh": mesh} for mesh in known[:for_meshes]]
    found = _try(config, topology, options, length, compile, told)
    best = max(found, key=lambda trial: (trial.fits, trial.images_a_second))
    for _ in range(tries - len(found)):
        if not best.fits:
            break
        mesh = best.config.mesh
        settings = {"mesh": (mesh.data, mesh.fsdp, mesh.tensor), "batch": 2 * best.config.train.batch}
        found += _try(config, topology, [settings], length, compile, told)
        if not found[-1].fits or found[-1].images_a_second < 1.02 * best.images_a_second:
            break
        best = found[-1]
    return sorted(found, key=lambda trial: (-trial.fits, -trial.images_a_second))


def _try(
    config: Config,
    topology: Topology,
    options: list[dict[str, Any]],
    length: int | None,
    compile: Compile,
    told: Callable[[str], None],
    *,
    until_fits: bool = False,
) -> list[Trial]:
    found = []
    for settings in options:
        words = changes(config, **settings)
        told(" ".join(words) or "as configured")
        now = changed(config, **settings)
        found.append(Trial(words, now, compile(now, topology, length=length)))
        if until_fits and found[-1].fits:
            break
    return found


def parameter_counts(config: Config) -> tuple[int, int]:
    """Returns how many parameters train and how many are frozen."""
    from tove_jax.plan.abstract import abstract_run

    state = abstract_run(config).state
    trained, frozen = (sum(math.prod(leaf.shape) for leaf in tree.values()) for tree in (state.trainable, state.frozen))
    return trained, frozen


def traffic(config: Config, mesh: tuple[int, int, int], parameters: tuple[int, int]) -> float:
    """Returns a rough number of bytes that a device sends in a step; it only puts meshes in order.

    Sharded weights are gathered forward and backward and their gradients scattered; replicas reduce their shards of
    the gradients; heads and hidden widths that are split cost two reductions of the activations a layer, each way.

    Args:
      config: of the run.
      mesh: (data, fsdp, tensor).
      parameters: see `parameter_counts`.
    """
    data, fsdp, tensor = mesh
    trained, frozen = parameters
    weights = 2.0 * (trained + frozen) / tensor
    sent = 2 * weights * (fsdp - 1) / fsdp + 2.0 * trained / tensor * (fsdp - 1) / fsdp
    sent += 2 * 2.0 * trained / (tensor * fsdp) * (data - 1) / data
    rows = config.train.batch / (data * fsdp)
    student = config.student
    tokens = (student.image_size // student.patch_size) ** 2 + 1
    activations = 2.0 * rows * tokens * student.width * student.layers
    if config.language.kind != "none":
        activations += 2.0 * rows * config.text.limit * config.language.width * config.language.layers
    return sent + 4 * 2 * activations * (tensor - 1) / tensor
