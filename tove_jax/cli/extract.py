"""`tove extract`: run the experts once and keep their features."""

from __future__ import annotations

import argparse

HELP = "run the experts over the pictures and store their features; resumes, several processes share the work"
TAKES_CONFIG = True
PROCESSES = "alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument(
        "--experts",
        metavar="A,B",
        help="Only these of the configured experts; those that training reads when left out.",
    )
    parser.add_argument(
        "--share",
        metavar="I/N",
        type=share,
        default=(),
        help="Only shards I, I + N, ... from 0, waiting for nobody: for hosts without a common disk. `process`: this "
        "process's number and their count, which is also what an object store takes. When left out, processes share one "
        "disk and take what is left to do.",
    )
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")


def share(text: str) -> tuple[int, int] | None:
    """Reads ``I/N``, or ``process`` as None; ValueError when it is neither."""
    if text == "process":
        return None
    number, slash, count = text.partition("/")
    if not slash or not 0 <= int(number) < int(count):
        raise ValueError(text)
    return int(number), int(count)


def run(args: argparse.Namespace) -> int:
    """Extracts the missing features and prints where they lie."""
    from tove_jax import methods
    from tove_jax.experts.run import extract_all
    from tove_jax.files import mirror
    from tove_jax.files.remote import is_remote

    read = methods.get(args.config.method.name).training_experts(args.config)
    only = args.experts.split(",") if args.experts else read
    apart = args.share is None or is_remote(args.config.features.path) or mirror.mirror_of(args.workdir) is not None
    part = args.share or ((args.processes.index, args.processes.count) if apart else None)
    progress = not args.quiet and args.processes.index == 0
    stores = extract_all(args.config, args.workdir, experts=only, progress=progress, share=part)
    for folders in stores.values():
        for folder in folders:
            print(folder)
    return 0
