"""`tove features`: look into feature stores."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "list, verify or describe stored features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument(
        "action",
        choices=("ls", "verify", "stats"),
        help="ls: a line a store; verify: read every record; stats: moments, and what each codec costs and loses.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="A store, a features folder or a run's folder.")
    parser.add_argument("--records", type=int, default=64, help="Records on which stats measures the codecs.")


def run(args: argparse.Namespace) -> int:
    """Prints what was asked; 1 when `verify` found a fault."""
    from tove_jax.experts import statistics, store

    faults = 0
    for path in store.find_stores(args.path):
        if args.action == "ls":
            print(store.summary(path))
        elif args.action == "stats":
            print(statistics.statistics(path, args.records))
        else:
            sound, problems = store.verify_store(path)
            for problem in problems:
                print(problem)
            print(f"{path}: {sound} sound records, {len(problems)} faults")
            faults += len(problems)
    return 1 if faults else 0
