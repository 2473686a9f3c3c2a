"""`tove merge`: distil the tokens of a finished run into one plain CLIP tower."""

from __future__ import annotations

import argparse

from tove_jax.config.schema import Config
from tove_jax.files.remote import folder

PROCESSES = "together"
HELP = "distil a finished run, experts or adapters included, into one plain CLIP tower; resumes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("run", type=folder, help="Folder of the finished run.")
    parser.add_argument("--workdir", type=folder, help="Run folder of the merged tower; RUN/merged when left out.")
    parser.add_argument("--step", type=int, help="A saved step of the run; its last when left out.")
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")


def settings(args: argparse.Namespace) -> Config:
    """Returns the run's settings, turned into those of its merge."""
    from tove_jax.train.merge import merge_settings

    return merge_settings(args.run, args.step)


def run(args: argparse.Namespace) -> int:
    """Trains the merged tower; returns 143 when a SIGTERM stopped it after saving."""
    from tove_jax.data.cache import cache_folder
    from tove_jax.files import mirror
    from tove_jax.train.loop import train

    # One that was named is open already.
    place = args.workdir or folder(f"{args.run}/merged")
    with mirror.opened(place, cache_folder(args.config.data.cache), send=args.processes.index == 0) as workdir:
        return train(args.config, workdir, progress=not args.quiet)
