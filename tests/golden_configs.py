"""Golden text of every shipped config: settings, parameters with their groups, partition specs.

`python -m tests.golden_configs` writes the files anew; read the difference before committing it.
"""

import dataclasses
import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "goldens" / "configs"
CONFIGS = (
    "base.py",
    "demo.py",
    "demo.py:method=hawaii",
    "demo.py:method=tove",
    "demo.py:smoke",
    "demo_vlm.py",
    "move_kd_vit_l.py",
    "move_kd_vit_l.py:teachers=v1_1,stage=2,preset=reference",
)


def cards(config):
    """Returns the cards of a config's experts without a weight being read."""
    from tove_jax.bench.cost import EXPERTS
    from tove_jax.experts import registry

    student, found = config.student, {}
    grid = student.image_size // student.patch_size
    for spec in config.features.experts:
        name = spec.partition(":")[0]
        if name == "clip":
            clip = registry.cards()["clip"]
            found[name] = dataclasses.replace(clip, grid=(grid, grid), width=student.width, summary_width=student.width)
        elif name in EXPERTS:
            *size, channels = EXPERTS[name]
            found[name] = dataclasses.replace(registry.cards()["clip"], name=name, grid=tuple(size), width=channels)
        else:
            found[name] = registry.describe(spec)
    return found


def text(name):
    """Returns the golden text of ``file.py[:argument]``."""
    import jax
    import jax.numpy as jnp

    from tove_jax import methods
    from tove_jax.config import from_file
    from tove_jax.config.schema import MeshConfig
    from tove_jax.parallel import logical_specs, make_mesh, tree_shardings
    from tove_jax.train.language import abstract_language
    from tove_jax.train.objective import logical_axes, make_student
    from tove_jax.train.state import flatten, parameter_factors

    config = from_file(str(ROOT / "configs" / name))
    lines = [f"{path} = {value!r}" for path, value in flatten(dataclasses.asdict(config)).items()]
    student = make_student(config)
    size = config.student.image_size

    def init(key):
        module = methods.get(config.method.name)
        extra = module.init_extra(config, cards(config), student.grid**2, key)
        return {"student": student.init(key, jnp.zeros((1, size, size, 3)))["params"], "method": extra}

    shapes = jax.eval_shape(init, jax.random.key(0))
    if (language := abstract_language(config)) is not None:
        shapes["language"] = language[1]
    shapes = flatten(shapes)
    factors = parameter_factors(config.optim, shapes)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shardings = tree_shardings(shapes, logical_specs(shapes, logical_axes(config), "logical axes"), mesh)
    lines.append("\nparameters, their learning-rate factor, and their axes on data 2 x fsdp 2 x tensor 2")
    for path, leaf in sorted(shapes.items()):
        group = "frozen" if factors[path] is None else f"{factors[path]:g}"
        lines.append(f"{path} {leaf.shape} {group} {tuple(shardings[path].spec)}")
    return "\n".join(lines) + "\n"


def file_of(name):
    """Returns the golden file of a config."""
    return FOLDER / (re.sub(r"[:=,]", "-", name.replace(".py", "")) + ".txt")


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for config_name in CONFIGS:
        file_of(config_name).write_text(text(config_name))
