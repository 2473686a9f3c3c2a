"""`tove compare`: several settings over several seeds, one table, paired."""

from __future__ import annotations

import argparse
from pathlib import Path

from tove_jax.config.sweep import Sweep
from tove_jax.files.remote import disk_folder

HELP = "train several settings over several seeds: one table with spreads and paired differences, and a plot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("sweep", metavar="FILE.py[:ARGUMENT]", help="Sweep file, such as configs/sweeps/methods.py.")
    parser.add_argument("--workdir", type=disk_folder, default=Path("runs/compare"), help="Folder of all runs.")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="Only these rows.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="In place of the file's seeds.")
    parser.add_argument("--no-train", action="store_true", help="Only compare the runs that are done.")
    parser.add_argument("--dry-run", action="store_true", help="List the runs and which are done; write nothing.")
    parser.add_argument("--part", action="store_true", help="Others work on other runs of the folder; no table.")
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")


def run(args: argparse.Namespace) -> int:
    """Trains and judges what is not done, prints the table and writes table and plot."""
    from tove_jax.config.sweep import from_sweep_file
    from tove_jax.eval.compare import run_sweep, states
    from tove_jax.eval.compare_table import runs_table
    from tove_jax.parallel import start

    sweep = from_sweep_file(args.sweep).only(args.rows, args.seeds)
    if args.dry_run:
        print(runs_table(states(sweep, args.workdir)))
        return 0
    if not args.no_train:
        start.require_one("tove compare")
    if not args.no_train and (status := run_sweep(sweep, args.workdir, progress=not args.quiet, part=args.part)):
        return status
    if not args.part:
        write_table(sweep, args)
    return 0


def write_table(sweep: Sweep, args: argparse.Namespace) -> None:
    """Prints the table of what is done, and writes it and its plot into the folder."""
    from tove_jax.eval.compare_table import table
    from tove_jax.eval.comparison import collect
    from tove_jax.files.atomic import atomic_write_bytes
    from tove_jax.report.compare import draw

    result = collect(sweep, args.workdir)
    words = ["tove", "compare", args.sweep, f"--workdir={args.workdir}"]
    words += ["--rows", *args.rows] if args.rows else []
    words += ["--seeds", *map(str, args.seeds)] if args.seeds else []
    text = f"`{' '.join(words)}`\n\n{table(result, markdown=True)}\n"
    atomic_write_bytes(args.workdir / "compare.md", text.encode())
    atomic_write_bytes(args.workdir / "compare.svg", draw(result).encode())
    print(table(result))
    print(args.workdir / "compare.svg")
