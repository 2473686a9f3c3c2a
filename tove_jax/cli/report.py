"""`tove report`: one self-contained HTML page about a run."""

from __future__ import annotations

import argparse

from tove_jax.cli.stored import of_run

HELP = "write a run's report, one HTML page that loads nothing"
TAKES_CONFIG = True
settings = of_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--pictures", type=int, default=6, help="Held-out pictures, and photographs, with maps.")


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints its path."""
    from tove_jax.report.make import make_report

    print(make_report(args.workdir, args.config, pictures=args.pictures))
    return 0
