"""`tove train`: distil the experts into the student."""

from __future__ import annotations

import argparse

PROCESSES = "together"
HELP = "train the student on the experts' features; resumes a run that was stopped"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")


def run(args: argparse.Namespace) -> int:
    """Trains; returns 143 when a SIGTERM stopped the run after saving."""
    from tove_jax.train.loop import train

    return train(args.config, args.workdir, progress=not args.quiet)
