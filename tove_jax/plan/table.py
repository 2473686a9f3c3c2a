"""The tables of docs/scaling.md: ``python -m tove_jax.plan.table``; hours long, and goes on where it stopped."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tove_jax.config import from_file
from tove_jax.errors import InputError
from tove_jax.files.atomic import atomic_write_bytes
from tove_jax.plan.chips import GIB, parse
from tove_jax.plan.compile import compile_step
from tove_jax.plan.report import READING, figures
from tove_jax.plan.search import sizes, with_mesh

PAGE = Path("docs/scaling.md")
MARKS = re.compile(r"(<!-- plans (\w+): python -m tove_jax\.plan\.table -->\n)(.*?)(<!-- /plans -->)", re.S)
_MOVE_KD, _HAWAII, _TOVE = (f"configs/{name}.py" for name in ("move_kd_vit_l", "hawaii_vit_l", "tove_vit_b"))
_CAPTIONS = 768  # tokens that rows of stage 1 are padded to: a picture's 576 and a caption


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
      label: first cell.
      config: ``file.py:argument``.
      topology: see `tove_jax.plan.chips.parse`.
      slices: of it.
      batch: rows a chip; 0: the batch that the config says, on however many chips.
      length: tokens of a row of text; None: the longest.
      fsdp: shards of the parameters, replicas over the rest; 0: the mesh that the config finds.
    """

    label: str
    config: str
    topology: str
    slices: int = 1
    batch: int = 0
    length: int | None = None
    fsdp: int = 0

    @property
    def key(self) -> str:
        """Name of its file."""
        slices = f"{self.slices}x" if self.slices > 1 else ""
        name = re.sub(r"configs/|\.py|:$", "", self.config)
        return re.sub(
            r"[^\w.\-]+",
            "-",
            f"{name}-{slices}{self.topology}-{self.batch}-{self.length or 'longest'}-{self.fsdp or 'any'}",
        )


def _growing(label: str, config: str, rows: int, length: int | None, fsdp: int) -> list[Row]:
    sizes = [(16, 1), (64, 1), (256, 1), (256, 2)]
    return [Row(label, config, f"v5e-{chips}", slices, rows, length, fsdp) for chips, slices in sizes if chips >= fsdp]


_PLACES = (
    *(("v5e-16", 1), ("v5e-64", 1), ("v5e-256", 1), ("v5p-128", 1), ("v6e-256", 1), ("v5e-256", 2)),
    *(("tpu7x-8", 1), ("h200:8", 1)),
)
TABLES: dict[str, tuple[Row, ...]] = {
    "growing": (
        *_growing("stage 1, features alone", f"{_MOVE_KD}:language=none", 4, None, 16),
        *_growing("stage 1, 7B", _MOVE_KD, 4, _CAPTIONS, 16),
        *_growing("stage 2, 7B", f"{_MOVE_KD}:stage=2", 1, None, 64),
        *_growing("stage 1, 13B", f"{_MOVE_KD}:language=13b", 4, _CAPTIONS, 16),
        *_growing("stage 2, 13B", f"{_MOVE_KD}:stage=2,language=13b", 1, None, 64),
    ),
    "shipped": tuple(
        Row(label, config, topology, slices)
        for label, config in (
            ("MoVE-KD, stage 1", _MOVE_KD),
            ("MoVE-KD, stage 2", f"{_MOVE_KD}:stage=2"),
            ("HAWAII, stage 1", _HAWAII),
            ("ToVE", _TOVE),
        )
        for topology, slices in _PLACES
    ),
}


def plan(row: Row) -> dict[str, Any]:
    """Compiles for a row.

    Raises:
      InputError: no mesh fits, or the compiler fails.
    """
    topology = parse(row.topology, row.slices)
    config = from_file(row.config, [])
    if row.batch:
        train = dataclasses.replace(config.train, batch=row.batch * topology.chips)
        config = dataclasses.replace(config, train=train)
    mesh = (topology.devices // row.fsdp, row.fsdp, 1) if row.fsdp else sizes(config, topology)
    config = with_mesh(config, mesh)
    return figures(config, topology, compile_step(config, topology, length=row.length))


def line(row: Row, found: Mapping[str, Any]) -> str:
    """Returns a row of the Markdown table; † marks a plan whose program was read in an earlier way."""
    mesh = " x ".join(str(size) for size in found["mesh"].values())
    label = row.label if found.get("reading", 1) == READING else f"{row.label} †"
    cells = [label, found["topology"]["name"], mesh, str(found["batch"])]
    if "memory" not in found:
        return "| " + " | ".join([*cells, f"**{found['needed'] / GIB:.1f}**", *[""] * 7]) + " |"
    memory, roofline = found["memory"], found["roofline"]
    hidden = sum(part["hidden_s"] for part in roofline["traffic"]) / max(roofline["network_s"], 1e-12)
    total = f"{memory['total'] / GIB:.1f}"
    cells += [
        total if found["fits"] else f"**{total}**",
        f"{sum(part['bytes'] for part in roofline['traffic'] if part['link'] == 'chip') / 1e9:.2f}",
        f"{sum(part['bytes'] for part in roofline['traffic'] if part['link'] == 'network') / 1e6:.1f}",
        f"{hidden:.0%}",
        f"{1e3 * roofline['compute_s']:.0f} / {1e3 * roofline['memory_s']:.0f} / {1e3 * roofline['network_s']:.0f}",
        f"{1e3 * roofline['step_s']:.0f}",
        f"{found['mfu']:.0%}",
        f"{found['compile_s']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| step | chips | data x fsdp x tensor | batch | GiB | GB sent in a slice | MB between slices | hidden | "
    "compute / memory / network, ms | step, ms | MFU | compile, s |\n" + "|---" * 12 + "|\n"
)


def table(name: str, plans: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the Markdown table of the rows that are planned.

    Args:
      name: of `TABLES`.
      plans: `Row.key` -> figures.
    """
    return HEAD + "".join(line(row, plans[row.key]) + "\n" for row in TABLES[name] if row.key in plans)


def write(page: Path, plans: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts the tables between the page's marks that name this command."""
    text = MARKS.sub(lambda match: f"{match[1]}\n{table(match[2], plans)}\n{match[4]}", page.read_text())
    atomic_write_bytes(page, text.encode())


def read(folder: Path, rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Reads the plans that are kept in a folder."""
    files = {row.key: folder / f"{row.key}.json" for row in rows}
    return {key: json.loads(file.read_text()) for key, file in files.items() if file.is_file()}


def main(argv: list[str] | None = None) -> int:
    """Plans what is not planned yet, and writes the page; returns 0."""
    parser = argparse.ArgumentParser(description="Plans of the full-size configs, for docs/scaling.md.")
    parser.add_argument("tables", nargs="*", help="Tables of: " + ", ".join(TABLES) + "; all when left out.")
    parser.add_argument("--plans", type=Path, default=Path("runs/plans"), help="Folder in which plans are kept.")
    parser.add_argument("--only", default="", help="Only rows whose name holds this.")
    parser.add_argument("--no-compile", action="store_true", help="Write the page from the plans that are kept.")
    args = parser.parse_args(argv)
    rows = [row for name in args.tables or TABLES for row in TABLES[name] if args.only in row.key]
    kept = read(args.plans, rows)
    missing = [] if args.no_compile else [row for row in rows if row.key not in kept]
    for row in tqdm(missing, desc="plans", unit="plan"):
        try:
            found = plan(row)
        except InputError as error:
            print(f"{row.key}: {error}", file=sys.stderr)
            continue
        args.plans.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(args.plans / f"{row.key}.json", (json.dumps(found, indent=1) + "\n").encode())
    write(PAGE, read(args.plans, [row for rows in TABLES.values() for row in rows]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
