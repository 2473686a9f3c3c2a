"""Compiles the programs beside this file: `python -m tests.goldens.plan.two_layers`; wants libtpu.

Six layers of two products each, scanned and computed again in the backward pass, the weights sharded over the four
chips of a v5e:2x2, the rows over all; once one slice, once two.
"""

import os
import re
from pathlib import Path

WIDTH, HIDDEN, LAYERS, ROWS = 1024, 2048, 6, 64


def text(slices):
    """Returns the scheduled program of a v5e:2x2, or of two."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from tove_jax.config.schema import MeshConfig
    from tove_jax.parallel import make_mesh

    def loss(weights, x):
        def body(x, w):
            return jnp.tanh(x @ w[0]) @ w[1] + x, None

        x, _ = jax.lax.scan(jax.checkpoint(body), x, weights)
        return (x.astype(jnp.float32) ** 2).mean()

    options = {"num_slices": slices} if slices > 1 else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", **options).devices
    mesh = make_mesh(MeshConfig(slices, 4, 1), devices)
    specs = [(None, "fsdp"), (None, None, "fsdp")]
    weights = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    shapes = [(LAYERS, WIDTH, HIDDEN), (LAYERS, HIDDEN, WIDTH)]
    given = tuple(
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=at) for shape, at in zip(shapes, weights, strict=True)
    )
    x = jax.ShapeDtypeStruct((ROWS * 4 * slices, WIDTH), jnp.bfloat16, sharding=rows)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss), out_shardings=tuple(weights)).lower(given, x).compile()
    found = compiled.as_text()
    found = re.sub(r", metadata=\{[^{}]*\}", "", found)
    found = re.sub(r", backend_config=\{.*?\}$", "", found, flags=re.M)
    found = re.sub(r", (entry_computation_layout|input_output_alias|allow_spmd).*", "", found)
    found = re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*", "\n", found)
    found = re.sub(r", (frontend_attributes=\{is_spmd_generated=\"true\"\}|is_spmd_generated=\"true\")", "", found)
    return "\n".join(line for line in found.splitlines() if line.strip()) + "\n"


if __name__ == "__main__":
    from tove_jax.plan.chips import parse
    from tove_jax.plan.compile import environment_of

    os.environ.update(environment_of(parse("v5e:2x2")))
    for number, name in ((1, "one_slice"), (2, "two_slices")):
        (Path(__file__).parent / f"v5e_2x2_{name}.hlo").write_text(text(number))
