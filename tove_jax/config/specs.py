"""How an expert is named in `features.experts`, and what it is called from then on."""

from __future__ import annotations

import dataclasses
import re

KINDS = ("torch", "onnx", "python")
"""Kinds of experts that no table lists; see `tove_jax.experts.foreign`."""

_NAMED = re.compile(rf"(?:(?P<name>[^=:/]*)=)?(?P<kind>{'|'.join(KINDS)}):(?P<source>.*?)(?::(?P<size>[0-9]+))?")


@dataclasses.dataclass(frozen=True)
class ForeignSpec:
    """An expert that no table lists, as a settings file names it: ``[name=]kind:source[:size]``.

    Attributes:
      name: what it is called; when not given, ``kind-`` and the end of the source: ``torch:facebook/dinov2-small``
        is called ``torch-dinov2-small``, ``onnx:models/edges.onnx`` ``onnx-edges``.
      kind: one of `KINDS`.
      source: what the kind says: a file, a hub id, ``package.module:callable``.
      size: pixels a side, or None for the model's own.
    """

    name: str
    kind: str
    source: str
    size: int | None = None

    @property
    def origin(self) -> str:
        """The spec without the name."""
        return f"{self.kind}:{self.source}" + (f":{self.size}" if self.size else "")


def foreign(spec: str) -> ForeignSpec | None:
    """Returns the parts of ``[name=]kind:source[:size]``, or None for the spec of a registered expert."""
    match = _NAMED.fullmatch(spec)
    if match is None:
        return None
    kind, source = match["kind"], match["source"]
    name = match["name"]
    if name is None:
        end = re.sub(r"\.onnx$", "", re.split(r"[/\\]", source.rstrip("/\\"))[-1])
        if kind != "onnx" and ":" in end:
            end = "-".join(end.replace(":", ".").split(".")[-2:])
        name = f"{kind}-{re.sub(r'[^A-Za-z0-9_-]+', '-', end).strip('-')}"
    return ForeignSpec(name, kind, source, int(match["size"]) if match["size"] else None)


def expert_name(spec: str) -> str:
    """Returns what an expert is called: ``hed`` for ``hed:112``, ``mine`` for ``mine=onnx:model.onnx``.

    Names of folders, of the method's parameters and of metrics come from it.
    """
    found = foreign(spec)
    return spec.partition(":")[0] if found is None else found.name
