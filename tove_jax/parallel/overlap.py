"""What a step's compiler is asked for, so that chips work while the network does."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from tove_jax.parallel.sharding import replicated

OPTIONS: dict[str, dict[str, bool]] = {
    # Collectives fused with other work are not asked for: v5e has them anyway, and for v5p and later newer compilers
    # refuse them, as a cause of wrong results.
    "tpu": {
        # A product with a gathered weight stays one product. In a ring of parts each part reads and writes the whole
        # result, which costs more than the gathering that it hides.
        "xla_tpu_enable_windowed_einsum_for_all_gather": False,
        "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
        # Shards narrower than a tile of memory are gathered as they are, where gathers can run beside other work (v5e),
        # not by a sum of padded ones, of twice the bytes.
        "xla_tpu_prefer_async_allgather_to_allreduce": True,
    },
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}
"""Compiler options by platform; docs/performance.md has what they change."""


def compiler_options(mesh: Mesh, options: Mapping[str, Mapping[str, bool]] = OPTIONS) -> dict[str, bool]:
    """Returns the options for a mesh's devices; none where there is one device, or for processors.

    Options that the installed compiler does not know are left out, with a line on stderr.

    Args:
      mesh: its devices may be those of a topology that is not there.
      options: by platform.
    """
    devices = list(mesh.devices.flat)
    wanted = dict(options.get(devices[0].platform, {})) if len(devices) > 1 else {}
    while wanted and (unknown := _unknown(wanted, mesh)):
        del wanted[unknown]
        if not jax.process_index():
            print(f"tove: this compiler does not know {unknown}; the step is compiled without it", file=sys.stderr)
    return wanted


def _unknown(options: dict[str, bool], mesh: Mesh) -> str | None:
    """Returns an option that the devices' compiler does not know, if there is one."""
    number = jax.ShapeDtypeStruct((), "float32", sharding=replicated(mesh))
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(number).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"No such compile option: '(\w+)'", str(error))
        if found is None or found[1] not in options:
            raise
        return found[1]
    return None
