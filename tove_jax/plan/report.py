"""A plan in words and numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from tove_jax.config.schema import Config
from tove_jax.plan import profile
from tove_jax.plan.chips import GIB, Topology
from tove_jax.plan.compile import Compiled
from tove_jax.plan.search import Trial, sizes

READING = 2
"""Of the way in which compiled programs are read; figures of another number cannot be compared."""
_KINDS = {
    "trainable": "parameters that train",
    "frozen": "frozen parameters",
    "optimiser": "optimiser",
    "experts": "experts in the step",
    "batch": "batch",
    "padding": "layout of these",
    "gradients": "gradients",
    "activations": "activations and gathered weights",
    "code": "program",
}


def figures(config: Config, topology: Topology, compiled: Compiled) -> dict[str, Any]:
    """Returns everything that is known of a planned step, JSON-ready.

    Args:
      config: of the run, with the mesh that was compiled for.
      topology: that it was compiled for.
      compiled: what came of it.
    """
    data, fsdp, tensor = sizes(config, topology)
    chip, device = topology.chip, topology.chip.device
    found: dict[str, Any] = {
        "title": config.title,
        "reading": READING,
        "topology": {
            "name": topology.name,
            "chips": topology.chips,
            "devices": topology.devices,
            "hosts": topology.hosts,
            "source": chip.source,
            "peak_flops": device.flops,
            "memory": device.memory,
            "bandwidth": device.bandwidth,
        },
        "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor},
        "batch": config.train.batch,
        "accumulation": config.train.accumulation,
        "steps": config.train.steps,
        "compile_s": compiled.compile_s,
        "fits": compiled.memory is not None and compiled.memory.fits,
        "needed": compiled.needed,
        "model_flops": compiled.model_flops,
        "step_flops": compiled.step_flops,
    }
    if compiled.memory is None or compiled.roofline is None:
        return found
    memory = dataclasses.asdict(compiled.memory)
    memory["activations"] = max(0, memory["temporaries"] - memory["gradients"])
    memory |= {"total": compiled.memory.total}
    step = compiled.roofline["step_s"]
    hours = config.train.steps * step / 3600
    found |= {
        "memory": memory,
        "roofline": compiled.roofline,
        "intensity": compiled.roofline["flops"] / max(1.0, compiled.roofline["bytes"]),
        "ridge": device.flops / device.bandwidth,
        "mfu": compiled.model_flops / (step * topology.devices * device.flops),
        "images_a_second": config.train.batch / step,
        "input": {
            "host_bytes_a_second": compiled.batch_bytes / topology.hosts / step,
            "feature_bytes_a_second": compiled.feature_bytes / topology.hosts / step,
        },
        "hours": hours,
        "chip_hours": hours * topology.chips,
    }
    return found


def text(found: dict[str, Any]) -> str:
    """Returns the figures as a page of text."""
    place, mesh = found["topology"], found["mesh"]
    accumulated = f" in {found['accumulation']} pieces" if found["accumulation"] > 1 else ""
    each = "device" if place["devices"] > place["chips"] else "chip"
    lines = [
        f"{found['title'] or 'run'} on {place['name']}: {place['chips']} chips, {place['hosts']} hosts, mesh "
        + " x ".join(f"{name} {size}" for name, size in mesh.items())
        + f", batch {found['batch']}{accumulated}",
        f"compiled in {found['compile_s']:.0f} s; chip's figures: {place['source']}",
    ]
    if each == "device":
        lines.append(f"{place['devices'] // place['chips']} devices a chip; below a device's share")
    lines.append("")
    if "memory" not in found:
        lines.append(
            f"does not fit: the compiler needs {found['needed'] / GIB:.1f} of {place['memory'] / GIB:.1f} GiB a {each}"
        )
        return "\n".join(lines)
    memory = found["memory"]
    lines.append(f"memory a {each}, GiB")
    for kind, label in _KINDS.items():
        if memory[kind] >= 5e5:
            lines.append(f"  {memory[kind] / GIB:8.3f}  {label}")
    verdict = "fits" if found["fits"] else "does NOT fit"
    lines.append(f"  {memory['total'] / GIB:8.3f}  of {memory['limit'] / GIB:.1f}: {verdict}")
    if memory["estimated"]:
        lines.append(
            "  (arguments are exact; activations are an estimate, by the compiler for processors, which keeps half "
            "precision as float32 and fuses less)"
        )
    line = found["roofline"]
    lines += ["", f"sent a {each} and step" + (", of which beside other work" if line["traffic"] else "")]
    for row in line["traffic"]:
        share = row["hidden_s"] / row["seconds"] if row["seconds"] else 0.0
        lines.append(
            f"  {row['bytes'] / 1e6:10.1f} MB  {row['kind']} ({row['link']}), {row['count']:.0f} times, "
            f"{1e3 * row['seconds']:.1f} ms, {share:.0%} hidden"
        )
    if not line["traffic"]:
        lines.append("  nothing")
    lines += [
        "",
        f"operations a step: {found['model_flops'] / 1e12:.1f} TFLOP, with what is computed again "
        f"{found['step_flops'] / 1e12:.1f}; compiled, a {each}: {line['flops'] / 1e12:.2f}",
        f"intensity {found['intensity']:.0f} FLOP a byte; the chip's ridge is at {found['ridge']:.0f}",
        f"roofline: compute {1e3 * line['compute_s']:.1f} ms, memory {1e3 * line['memory_s']:.1f} ms, network "
        f"{1e3 * line['network_s']:.1f} ms ({1e3 * line['exposed_s']:.1f} exposed); bound by {line['bound']}",
        f"step {1e3 * line['step_s']:.1f} ms at best: {found['images_a_second']:.0f} pictures a second, "
        f"MFU {found['mfu']:.0%}",
        f"input: {found['input']['host_bytes_a_second'] / 1e6:.0f} MB a second a host, features from the store "
        f"{found['input']['feature_bytes_a_second'] / 1e6:.0f} of them",
        f"{found['steps']} steps: {found['hours']:.2f} hours, {found['chip_hours']:.1f} chip-hours",
    ]
    if "profile" in found:
        lines += ["", profile.table(profile.read(found["profile"]), line["step_s"])]
    return "\n".join(lines)


def trials_text(trials: Sequence[Trial]) -> str:
    """Returns tries as a table, a line each."""
    lines = []
    for trial in trials:
        found = trial.compiled.roofline
        told = "does not fit" if not trial.fits else "fits"
        size = f"{trial.compiled.needed / GIB:7.2f} GiB"
        rate = f"{trial.images_a_second:9.0f} pictures/s" if found else " " * 20
        lines.append(f"  {told:12s} {size} {rate}  {' '.join(trial.changes) or 'as configured'}")
    return "\n".join(lines)


def trials_json(trials: Sequence[Trial], topology: Topology) -> list[dict[str, Any]]:
    """Returns tries, JSON-ready."""
    return [{"changes": list(trial.changes), **figures(trial.config, topology, trial.compiled)} for trial in trials]


def to_json(found: dict[str, Any]) -> str:
    """Returns figures as JSON text."""
    return json.dumps(found, indent=1)
