"""Counts the operations of the experts: ``python -m tove_jax.experts.flops`` writes `tove_jax/experts/gflops.py`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from tqdm import tqdm

from tove_jax.experts import registry
from tove_jax.files.atomic import atomic_write_bytes
from tove_jax.models import efficientnet

FILE = Path(__file__).with_name("gflops.py")
_HEAD = '''"""Operations of each published expert, 1e9 a picture; written by `python -m tove_jax.experts.flops`."""

GFLOPS = {
'''
# They have no row with an abstract network; their weights are small and come in packages.
_LOADED = ("efficientnet_lite0", "hed")


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the operations of a function's matrix products and convolutions, two a multiplication with its sum.

    Nothing is computed or compiled. Loops of known length (`jax.lax.scan`) count in full, which the compiler's own
    account does not do; of branches the dearest one.

    Args:
      function: of JAX arrays.
      *arguments: arrays, or `jax.ShapeDtypeStruct` in their place.

    Raises:
      ValueError: a loop whose length is not known beforehand holds a product.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        if kind == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = _shape(equation.invars[0])
            total += 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)
        elif kind == "conv_general_dilated":
            kernel = _shape(equation.invars[1])
            taps = math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
            # Zeros between the cells of a transposed convolution's input are not multiplied.
            total += 2.0 * math.prod(_shape(equation.outvars[0])) * taps / math.prod(params["lhs_dilation"])
        elif kind == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(_count(body) for body in _bodies(params.values()))
            if kind == "while" and inner:
                raise ValueError("a loop of unknown length holds matrix products")
            total += inner * params.get("length", 1) if kind == "scan" else inner
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _bodies(values: Collection[Any]) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _bodies(value)


@contextlib.contextmanager
def _grouped() -> Iterator[None]:
    """Traces depthwise convolutions as such also on CPUs, where they run as shifted sums of no product's kind."""

    def grouped(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
        names = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(
            x, kernel, strides, "SAME", dimension_numbers=names, feature_group_count=x.shape[-1]
        )

    before = efficientnet.depthwise_by_shifts
    efficientnet.depthwise_by_shifts = grouped
    try:
        yield
    finally:
        efficientnet.depthwise_by_shifts = before


@_grouped()
def expert_gflops(names: Collection[str] | None = None, *, progress: bool = False) -> dict[str, float]:
    """Returns the operations of experts at their published size, 1e9 a picture, without their weights.

    Experts on the host, and `clip`, whose size its weights decide, are left out.

    Args:
      names: of the experts; None: all.
      progress: show a bar.
    """
    rows = {row.card.name: row for family in registry.FAMILIES for row in family.ROWS}
    wanted = [name for name in (*_LOADED, *rows) if names is None or name in names]
    found = {}
    for name in tqdm(wanted, desc="experts", unit="expert", disable=not progress):
        if name in rows:
            row, size = rows[name], rows[name].card.view.size
            module = row.build(size)
            params = row.abstract()
            pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
            operations = flops(lambda p, x, row=row, module=module: row.features(module, p, x), params, pixels)
        else:
            expert = registry.load(name)
            size = expert.card.view.size
            operations = flops(expert.apply, expert.params, jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8))
        found[name] = float(f"{operations / 1e9:.4g}")
    return found


def main() -> None:
    """Counts all experts and writes the file."""
    lines = [f'    "{name}": {value},\n' for name, value in expert_gflops(progress=True).items()]
    atomic_write_bytes(FILE, (_HEAD + "".join(lines) + "}\n").encode())


if __name__ == "__main__":
    main()
