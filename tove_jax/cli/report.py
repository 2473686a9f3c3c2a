"""`tove report`: one self-contained HTML page about a run, or one table of several runs' answers."""

from __future__ import annotations

import argparse

from tove_jax.cli.stored import of_run
from tove_jax.config.schema import Config
from tove_jax.files.remote import folder

HELP = "write a run's report, one HTML page that loads nothing, or with --answers a table over several runs"
TAKES_CONFIG = True


def settings(args: argparse.Namespace) -> Config:
    """Returns the run's settings; a table over several runs needs none."""
    return Config() if args.answers else of_run(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--pictures", type=int, default=6, help="Held-out pictures, and photographs, with maps.")
    parser.add_argument(
        "--answers", type=folder, nargs="+", default=[], metavar="RUN",
        help="In place of a page: these runs' answers to one task side by side, paired by question.",
    )  # fmt: skip
    parser.add_argument("--task", default="held_out", help="Of --answers, by the name its results are filed under.")


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints its path, or prints and writes the table."""
    if args.answers:
        from tove_jax.files import mirror
        from tove_jax.report.asked import write_comparison

        print(write_comparison([mirror.reading(run) for run in args.answers], args.task, args.workdir))
        return 0
    from tove_jax.report.make import make_report

    print(make_report(args.workdir, args.config, pictures=args.pictures))
    return 0
