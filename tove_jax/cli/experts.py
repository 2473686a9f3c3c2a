"""`tove experts`: the known experts."""

from __future__ import annotations

import argparse

HELP = "print the known experts, their licences, inputs and outputs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--markdown", action="store_true", help="print the docs page with the full table")


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    from tove_jax.experts import table

    print(table.page() if args.markdown else table.plain(), end="")
    return 0
