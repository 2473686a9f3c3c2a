"""`tove merge`: distil the tokens of a finished run into one plain CLIP tower."""

from __future__ import annotations

import argparse
from pathlib import Path

from tove_jax.config.schema import Config

PROCESSES = "together"
HELP = "distil a finished run, experts or adapters included, into one plain CLIP tower; resumes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("run", type=Path, help="Folder of the finished run.")
    parser.add_argument("--workdir", type=Path, help="Run folder of the merged tower; RUN/merged when left out.")
    parser.add_argument("--step", type=int, help="A saved step of the run; its last when left out.")
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")


def settings(args: argparse.Namespace) -> Config:
    """Returns the run's settings, turned into those of its merge."""
    from tove_jax.train.merge import merge_settings

    return merge_settings(args.run, args.step)


def run(args: argparse.Namespace) -> int:
    """Trains the merged tower; returns 143 when a SIGTERM stopped it after saving."""
    from tove_jax.train.loop import train

    return train(args.config, args.workdir or args.run / "merged", progress=not args.quiet)
