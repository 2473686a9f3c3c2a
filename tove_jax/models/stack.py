"""Runs a stack of equal layers: scanned where nothing is wanted in between, alone where something is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.errors import InputError
from tove_jax.models.tpu_attention import RESIDUALS

UNROLLED = 4  # Runs of at most this many layers are unrolled: 10 % faster on CPU, and quicker to compile.

Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class Requests:
    """What was asked for, by layer.

    Attributes:
      outputs: names of the outputs wanted of each layer.
      rows: the same of attention rows, by kind.
      reports: reports of the adapters wanted.
    """

    outputs: dict[int, list[str]]
    rows: dict[int, dict[str, list[str]]]
    reports: frozenset[str]


def parse(names: Sequence[str], depth: int, others: Sequence[str], *, adapter: bool = False) -> Requests:
    """Sorts the names of intermediates by layer.

    Args:
      names: ``layers/{i}``, ``layers/{i}/attention_cls``, ``layers/{i}/attention_cls_scores``,
        ``adapter/{report}``, or one of `others`; negative layers count from the end.
      depth: number of layers.
      others: names that the caller serves itself.
      adapter: whether the layers have one.

    Raises:
      InputError: an unknown name, a layer out of range, a report without an adapter.
    """
    outputs: dict[int, list[str]] = {}
    rows: dict[int, dict[str, list[str]]] = {}
    reports = set()
    for name in names:
        layer = re.fullmatch(r"layers/(-?\d+)(?:/(attention_cls|attention_cls_scores))?", name)
        if layer:
            index = int(layer[1])
            if not -depth <= index < depth:
                raise InputError(f"intermediate '{name}': the encoder has {depth} layers")
            index %= depth
            if layer[2]:
                rows.setdefault(index, {}).setdefault(layer[2], []).append(name)
            else:
                outputs.setdefault(index, []).append(name)
        elif name.startswith("adapter/"):
            if not adapter:
                raise InputError(f"intermediate '{name}': the encoder has no adapter")
            reports.add(name.removeprefix("adapter/"))
        elif name not in others:
            raise InputError(
                f"intermediate '{name}': expected {', '.join(others)}, layers/<i>, layers/<i>/attention_cls, "
                "layers/<i>/attention_cls_scores or adapter/<report>"
            )
    return Requests(outputs, rows, frozenset(reports))


def segments(asked: Requests, depth: int, output_wanted: bool, edge: int = 0) -> list[tuple[int, int]]:
    """Cuts the layers that must run into runs to scan, and layers to run alone.

    A run ends where an output is wanted, and at `edge`. A layer whose attention row is wanted stands alone, and so
    does the last one when only its router is: the compiler then drops the rest of that layer.
    """
    alone = set(asked.rows)
    last = max([-1, *asked.outputs, *asked.rows])
    if output_wanted:
        last = depth - 1
    elif asked.reports and last < depth - 1:
        last = depth - 1
        alone.add(last)
    cuts = {0, last + 1, min(edge, last + 1)}
    cuts.update(index + 1 for index in asked.outputs)
    cuts.update(edge for index in alone for edge in (index, index + 1))
    edges = sorted(cut for cut in cuts if cut <= last + 1)
    return list(zip(edges[:-1], edges[1:], strict=True))


def run_stack(
    block: nn.Module,
    stacked: Any,
    x: jax.Array,
    asked: Requests,
    *,
    output_wanted: bool,
    inputs: Any = None,
    keys: jax.Array | None = None,
    remat: Remat = "none",
    frozen_below: int = 0,
    **options: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the layers that something asked for depends on.

    Args:
      block: one layer, called as `tove_jax.models.block.Block` is; without a parent.
      stacked: the layers' parameters, every leaf with a leading axis over layers.
      x: input of the first layer.
      asked: what is wanted of the layers.
      output_wanted: whether the last layer's output is wanted.
      inputs: pytree given to the adapter of every layer alike.
      keys: of dropout, one a layer; None: no dropout.
      remat: see `tove_jax.models.vit.VisionTransformer`.
      frozen_below: the backward pass ends at this layer's input.
      **options: given to every layer, such as rotary tables.

    Returns:
      The output of the last layer run, and what was asked for by name; reports are (L, ...).
    """
    depth = jax.tree.leaves(stacked)[0].shape[0]
    found: dict[str, jax.Array] = {}
    told: list[dict[str, jax.Array]] = []
    for start, stop in segments(asked, depth, output_wanted, frozen_below):
        params = jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], stacked)
        rows = asked.rows.get(start, {})
        unroll = stop - start <= UNROLLED
        call = {"rows": frozenset(rows), "reports": asked.reports, "deterministic": keys is None, **options}
        run = _body(block, inputs, call, remat, prevent_cse=unroll)
        segment_keys = None if keys is None else keys[start:stop]
        if stop - start > 1:
            x, (_, reports) = jax.lax.scan(run, x, (params, segment_keys), unroll=unroll)
        else:
            x, (row, reports) = run(x, jax.tree.map(lambda leaf: leaf[0], (params, segment_keys)))
            reports = jax.tree.map(lambda leaf: leaf[None], reports)
            for kind, names in rows.items():
                found.update(dict.fromkeys(names, row[kind]))
        if stop == frozen_below:
            x = jax.lax.stop_gradient(x)
        told.append(reports)
        found.update(dict.fromkeys(asked.outputs.get(stop - 1, ()), x))
    for report in sorted(asked.reports):  # a set has another order in every process, and so would the program
        found[f"adapter/{report}"] = jnp.concatenate([part[report] for part in told])
    return x, found


def _body(
    block: nn.Module, inputs: Any, call: dict[str, Any], remat: Remat, prevent_cse: bool
) -> Callable[..., tuple[jax.Array, Any]]:
    def body(x: jax.Array, layer: tuple[Any, jax.Array | None]) -> tuple[jax.Array, Any]:
        params, key = layer
        rngs = None if key is None else {"dropout": key}
        result: Any = block.apply({"params": params}, x, inputs, rngs=rngs, **call)
        x, row, told = result
        return x, (row, told)

    return rematerialised(body, remat, prevent_cse=prevent_cse)


def rematerialised(body: Callable[..., Any], remat: Remat, *, prevent_cse: bool) -> Callable[..., Any]:
    """Returns a layer whose backward pass computes again what `remat` does not keep.

    Args:
      body: one layer.
      remat: see `tove_jax.models.vit.VisionTransformer`.
      prevent_cse: False inside a loop, where nothing can be merged across iterations and the barrier would
        only cost.
    """
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    dots = None
    if remat == "dots":
        kernels = policies.save_only_these_names(RESIDUALS)
        dots = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, kernels)
    return jax.checkpoint(body, policy=dots, prevent_cse=prevent_cse)
