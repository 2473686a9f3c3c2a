"""Golden text of how the full-size configs are sharded: a mesh a topology, and every parameter's axes on it.

`python -m tests.golden_specs` writes the files anew; read the difference before committing it. No device is needed.
"""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "goldens" / "specs"
CONFIGS = ("move_kd_vit_l.py:stage=1", "move_kd_vit_l.py:stage=2", "hawaii_vit_l.py", "tove_vit_b.py")
TOPOLOGIES = {
    "v5e-16": ("v5e-16", 1),
    "v5e-64": ("v5e-64", 1),
    "v5e-256": ("v5e-256", 1),
    "v5p-128": ("v5p-128", 1),
    "v6e-256": ("v6e-256", 1),
    "2 x v5e-256": ("v5e-256", 2),
    "tpu7x-8": ("tpu7x-8", 1),
    "8 x h200": ("h200:8", 1),
}


def text(name):
    """Returns the golden text of ``file.py[:argument]``."""
    from jax.sharding import AbstractMesh

    from tove_jax.config import from_file
    from tove_jax.parallel import logical_specs
    from tove_jax.parallel.mesh import AXES, AXIS_RULES, partition_spec
    from tove_jax.plan.abstract import abstract_run
    from tove_jax.plan.chips import parse
    from tove_jax.plan.search import sizes as sizes_of
    from tove_jax.train.objective import logical_axes

    config = from_file(str(ROOT / "configs" / name))
    state = abstract_run(config).state
    shapes = {**state.trainable, **state.frozen}
    names = logical_specs(shapes, logical_axes(config), "logical axes")
    sizes = {label: sizes_of(config, parse(*topology)) for label, topology in TOPOLOGIES.items()}
    lines = [f"batch {config.train.batch}"]
    for label, found in sizes.items():
        lines.append(f"{label}: " + " x ".join(f"{axis} {size}" for axis, size in zip(AXES, found, strict=True)))
    lines.append("\nparameters: shape, trains or frozen, axes on most topologies; on others")
    meshes = {label: AbstractMesh(found, AXES) for label, found in sizes.items()}
    for path in sorted(shapes):
        specs = {
            label: partition_spec(names[path], shapes[path].shape, mesh, AXIS_RULES) for label, mesh in meshes.items()
        }
        spelt = {label: ",".join(str(entry or "-") for entry in spec) or "-" for label, spec in specs.items()}
        usual = Counter(spelt.values()).most_common(1)[0][0]
        others = [f"{label} {spec}" for label, spec in spelt.items() if spec != usual]
        size = "x".join(map(str, shapes[path].shape))
        kind = "trains" if path in state.trainable else "frozen"
        lines.append("; ".join([f"{path} {size} {kind} {usual}", *others]))
    return "\n".join(lines) + "\n"


def file_of(name):
    """Returns the golden file of a config."""
    return FOLDER / (re.sub(r"[:=,]", "-", name.replace(".py", "")) + ".txt")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for config_name in CONFIGS:
        file_of(config_name).write_text(text(config_name))
