"""The config reference of the docs, written from the dataclasses: ``python -m tove_jax.config.reference``."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union

from tove_jax.config.schema import Config
from tove_jax.files.atomic import atomic_write_bytes

HEAD = """\
# Settings

<!-- Written by `python -m tove_jax.config.reference` from tove_jax/config/schema.py. -->

Every setting of a run. A config file (`configs/*.py`) returns all of them; `--config.SECTION.FIELD=VALUE` on the
command line changes one. An unknown field, a missing field or a value of another type is refused before anything
runs, and the nearest valid name is given.

`[code]` marks a default read in, or measured by running, the authors' released code. The sizes of the student are
those of CLIP ViT-L/14 at 336 pixels, MoVE-KD's student. A default that says nothing of its origin is ours.
"""


def markdown(kind: type = Config, where: str = "config") -> str:
    """Returns the reference as one Markdown page.

    Args:
      kind: dataclass of settings, whose fields carry a ``doc`` in their metadata.
      where: path of its fields on the command line.

    Returns:
      A heading and a table (field, type, default, meaning) for each kind of section, outermost first.
    """
    parts, shown = [HEAD], {}
    for path, section in sections(kind, where):
        if section not in shown:  # A section that stands in two places is written once.
            shown[section] = path
            parts.append(f"## `{path}`\n\n{_paragraph(section.__doc__ or '')}\n\n{_table(section, path, shown)}")
    return "\n".join(parts)


def sections(kind: type, where: str) -> Iterator[tuple[str, type]]:
    """Yields the path and dataclass of a section and of every section inside it, outermost first.

    A field that is a union of dataclasses, one of which is chosen by its ``name``, gives one section each.
    """
    yield where, kind
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        for inner in _dataclasses(hints[field.name]):
            yield from sections(inner, f"{where}.{field.name}")


def type_text(hint: Any) -> str:
    """Returns a type as the page shows it: choices one by one, sections by their path's last word."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return "any"
    if origin is Literal:
        return "one of " + ", ".join(f"`{choice!r}`" for choice in inner) if len(inner) > 1 else f"`{inner[0]!r}`"
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(part) for part in inner)
    if origin is tuple:
        if len(inner) == 2 and inner[1] is Ellipsis:
            return f"tuple of {type_text(inner[0])}"
        return "(" + ", ".join(type_text(part) for part in inner) + ")"
    if hint is type(None):
        return "none"
    return "section" if dataclasses.is_dataclass(hint) else hint.__name__


def _dataclasses(hint: Any) -> list[type]:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [typing.cast(type, kind) for kind in kinds if dataclasses.is_dataclass(kind)]


def _table(kind: type, path: str, shown: Mapping[type, str]) -> str:
    hints = typing.get_type_hints(kind)
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        nested = _dataclasses(hints[field.name])
        default = f"`{field.default!r}`"
        if nested:
            default = f"see `{shown.get(nested[0], f'{path}.{field.name}')}`"
        cells = (f"`{field.name}`", type_text(hints[field.name]), default, field.metadata["doc"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def main(argv: list[str] | None = None) -> int:
    """Writes the page; returns 0."""
    parser = argparse.ArgumentParser(description="Writes the config reference of the docs.")
    parser.add_argument("path", nargs="?", type=Path, default=Path("docs/config.md"), help="Markdown file to write.")
    path = parser.parse_args(argv).path
    atomic_write_bytes(path, markdown().encode())
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
