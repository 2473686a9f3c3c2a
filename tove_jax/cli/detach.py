"""`tove detach`: what each expert of a ToVE run contributes, and the encoder with ever fewer of them."""

from __future__ import annotations

import argparse

HELP = "detach a ToVE run's experts one by one: contribution, score and latency of every encoder"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--step", type=int, help="A saved step; the newest when left out.")
    parser.add_argument("--pictures", type=int, default=0, help="Held-out pictures that calibrate; 0: all.")
    parser.add_argument("--batch", type=int, default=8, help="Pictures of a timed call.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed calls; their median counts.")
    parser.add_argument("--no-latency", action="store_true", help="Do not load and time the experts.")
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")


def run(args: argparse.Namespace) -> int:
    """Detaches, prints the table and where the plot lies."""
    from tove_jax.eval.detach import detach_run, table

    result = detach_run(
        args.config,
        args.workdir,
        step=args.step,
        pictures=args.pictures,
        batch=args.batch,
        repeats=args.repeats,
        latency=not args.no_latency,
        progress=not args.quiet,
    )
    print(table(result))
    print(args.workdir / "eval" / "detach.png")
    return 0
