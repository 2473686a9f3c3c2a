"""`tove data`: what the configured pictures are."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "render or open the configured pictures, count them by label and split, draw a contact sheet"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="Write a contact sheet to this file.")
    parser.add_argument("--count", type=int, default=60, help="Pictures on the sheet (default: 60).")
    parser.add_argument("--check", action="store_true", help="Decode every picture and list the broken ones.")


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns 1 when `--check` finds broken pictures."""
    import numpy as np

    from tove_jax.data import make_source, overview
    from tove_jax.data.split import split

    config = args.config.data
    source = make_source(config)
    sides = split(source.ids, config.held_out, salt=config.split_salt, limit=config.limit)
    print(f"source   {source.name}, {len(source)} pictures\nlicence  {source.licence}\n")
    print(overview.counts_table(source, sides))
    used = np.sort(np.concatenate(sides))
    if args.check:
        broken = overview.find_broken(source, used, threads=config.threads)
        print("\n".join(broken) if broken else f"\nall {len(used)} pictures can be decoded")
        if broken:
            print(f"{len(broken)} of {len(used)} pictures are broken")
            return 1
    if args.sheet:
        shown = overview.contact_sheet(source, used, args.sheet, count=args.count)
        print(f"\n{shown} pictures on {args.sheet}")
    return 0
