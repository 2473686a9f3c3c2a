"""`tove eval`: how good the student's features are, beside its start, raw pixels and the experts."""

from __future__ import annotations

import argparse
from pathlib import Path

from tove_jax.cli.stored import of_run

HELP = "judge the student's features on held-out pictures"
TAKES_CONFIG = True
PROCESSES = "together"
settings = of_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--step", type=int, help="A saved step; the newest when left out.")
    parser.add_argument(
        "--seeds", type=Path, nargs="+", default=[], metavar="WORKDIR",
        help="Folders of further runs of this setting; mean and spread go into this run's metrics.json.",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints a table."""
    from tove_jax.errors import InputError
    from tove_jax.eval.run import evaluate_run, evaluate_runs
    from tove_jax.eval.runner import table
    from tove_jax.parallel import together

    if not args.seeds:
        metrics = evaluate_run(args.config, args.workdir, step=args.step)
        if together.is_first():
            print(table(metrics))
        return 0
    if args.step is not None:
        raise InputError("--step: expected no step beside --seeds, which takes each run's newest")
    summary = evaluate_runs(args.config, [args.workdir, *args.seeds])
    if not together.is_first():
        return 0
    print(f"{summary['eval/seeds/count']} runs, mean and standard deviation:")
    for name, value in summary.items():
        if name.endswith("/mean"):
            spread = summary[name.removesuffix("mean") + "std"]
            print(f"{name.removeprefix('eval/seeds/').removesuffix('/mean'):32s} {value:8.4f} ± {spread:.4f}")
    return 0
