"""Golden counts of the compiled training steps: operations, bytes, memory, fusions, collectives.

`python -m tests.bench_goldens` writes the file of the installed jax anew; read the difference before committing it: a
count that grew is work that every step does from then on. The counts are of tiny settings, compiled for processors
from shapes alone, and do not depend on how fast the machine is.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "goldens" / "counts"
SLACK = 0.02
"""By how much of the golden count a count may differ."""

CASES = {
    "move_kd": ("move_kd", "none", (1, 1, 1)),
    "hawaii": ("hawaii", "none", (1, 1, 1)),
    "tove": ("tove", "none", (1, 1, 1)),
    "merge": ("merge", "none", (1, 1, 1)),
    "move_kd with a language model": ("move_kd", "llava", (1, 1, 1)),
    "move_kd on 2x2x2": ("move_kd", "none", (2, 2, 2)),
    "move_kd with a language model on 2x2x2": ("move_kd", "llava", (2, 2, 2)),
}
"""Step -> method, language model, mesh as data x fsdp x tensor."""

CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler's options: what is counted is settled before machine code is made, and that is what takes the time."""

FIGURES = ("flops", "bytes", "temporaries", "fusions", "collectives")


def config_of(method, language):
    """Returns the benchmark's tiny settings, deep enough that layers are scanned, with two experts."""
    from tove_jax.bench import cases
    from tove_jax.config.derive import merged

    # Float32: which half-precision products a processor has differs from one to the next.
    source, decoder = ("move_kd" if method == "merge" else method), ("tiny" if language == "llava" else "")
    config = cases.config_of(source, "tiny", batch=8, dtype="float32", codec="float32", decoder=decoder, text=96)
    adapter = dataclasses.replace(config.student.adapter, rank=4, dropout=0.05)
    config = dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, patch_size=4, layers=6, heads=4, adapter=adapter),
        language=dataclasses.replace(config.language, layers=5, heads=4, kv_heads=4),
        train=dataclasses.replace(config.train, replicated_limit_mb=1e3),
    )
    return merged(config) if method == "merge" else config


def run_of(config):
    """Returns the step and its arguments as shapes, a merge's too, which the source's parameters decide."""
    import jax

    from tove_jax.config.schema import MergeConfig
    from tove_jax.methods import merge
    from tove_jax.plan import abstract
    from tove_jax.train.initial import state_builder
    from tove_jax.train.objective import training_step

    if not isinstance(config.method, MergeConfig):
        return abstract.abstract_run(config)
    source = merge.source_config(config)
    params = abstract.abstract_parameters(source, abstract.abstract_cards(source))
    start = {name: leaf for name, leaf in params["student"].items()}
    key = jax.random.key(0)
    params = jax.eval_shape(lambda source, start: merge.initial(config, source, start, key), params, start)
    build, optimizer = state_builder(config, params)
    online = abstract.abstract_online(config, ())
    step = training_step(config, {}, online, None, optimizer)
    batch = abstract.abstract_batch(config, {}, online)
    return abstract.AbstractRun(step, jax.eval_shape(build, params), batch, online.params, online)


def count(name):
    """Returns the figures of a step, of one device; loops count as often as they run."""
    import jax

    from tove_jax.config.schema import MeshConfig
    from tove_jax.parallel import make_mesh
    from tove_jax.plan.abstract import lower
    from tove_jax.plan.collectives import collectives
    from tove_jax.plan.hlo import Program

    method, language, sizes = CASES[name]
    config = config_of(method, language)
    config = dataclasses.replace(config, mesh=MeshConfig(*sizes))
    devices = sizes[0] * sizes[1] * sizes[2]
    mesh = make_mesh(config.mesh, jax.devices("cpu")[:devices])
    compiled = lower(config, run_of(config), mesh).compile(CHEAP)
    program = Program(compiled.as_text())
    found = dict.fromkeys(FIGURES, 0.0)
    for computation, times in program.runs():
        for one in computation.instructions:
            found["flops"] += times * program.flops(computation, one)
            found["bytes"] += times * program.bytes(computation, one)
            found["fusions"] += times * (one.opcode == "fusion")
    found["collectives"] = sum(one.times for one in collectives(program, devices, lambda *_: 0.0))
    found["temporaries"] = compiled.memory_analysis().temp_size_in_bytes
    return {figure: int(value) for figure, value in found.items()}


def version():
    """Returns the installed jax's minor version, whose compiler the counts are of."""
    import jax

    return re.match(r"\d+\.\d+", jax.__version__)[0]


def file_of(minor):
    """Returns the golden file of a minor version of jax."""
    return FOLDER / f"jax-{minor}.json"


def differences(name, found, golden):
    """Returns a line for each figure of a step that differs by more than the slack."""
    lines = []
    for figure in FIGURES:
        was, now = golden[figure], found[figure]
        if abs(now - was) > SLACK * was:
            change = f"{now / was - 1:+.1%}" if was else "from none"
            lines.append(f"{name}: {figure} {now:,}, golden {was:,} ({change})")
    return lines


def count_all():
    """Returns the figures of every step, counted in a process of its own.

    What a test run sets of XLA and JAX for its own speed would change the programs.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    command = [sys.executable, "-m", "tests.bench_goldens", "--print"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=kept, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


def main():
    """Counts every step; writes the golden file, or with `--print` only prints it."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    rows = [f"  {json.dumps(step)}: {json.dumps(count(step))}" for step in CASES]
    text = "{\n" + ",\n".join(rows) + "\n}\n"
    if "--print" not in sys.argv:
        FOLDER.mkdir(parents=True, exist_ok=True)
        file_of(version()).write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
