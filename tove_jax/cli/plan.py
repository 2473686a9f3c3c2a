"""`tove plan`: compiles a run's step for chips that are not there, and says what it takes."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

HELP = "what a run takes on a TPU slice or GPU node: memory, traffic, time; compiled without one"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="Such as v5e:16x16, v5e-256, v5p-128, h200:8 or cpu:8."
    )
    parser.add_argument("--slices", type=int, default=1, help="TPU slices, or nodes, of that shape.")
    parser.add_argument("--length", type=int, help="Tokens of a row of text; the longest bucket when left out.")
    parser.add_argument("--search", action="store_true", help="Find the best mesh and batch in place of the run's own.")
    parser.add_argument("--tries", type=int, default=4, help="Compilations of a search, or to make a run fit, at most.")
    parser.add_argument("--profile", action="store_true", help="Say which parts of the step take its time and bytes.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; 1 when the run does not fit as configured."""
    # TPU's library would look for chips here.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from tove_jax.plan.chips import parse
    from tove_jax.plan.compile import Compiled, compile_step
    from tove_jax.plan.report import figures, text, to_json, trials_json, trials_text
    from tove_jax.plan.search import mend, search, sizes, with_mesh

    def told(line: str) -> None:
        print(f"plan: compiling {line}", file=sys.stderr)

    def profiled(found: dict[str, Any], compiled: Compiled) -> dict[str, Any]:
        return {**found, "profile": compiled.profile} if args.profile and compiled.profile is not None else found

    topology = parse(args.topology, args.slices)
    options = {"tries": args.tries, "length": args.length, "told": told}
    if args.search:
        trials = search(args.config, topology, **options)
        if args.json:
            print(to_json({"search": trials_json(trials, topology)}))
        else:
            print(trials_text(trials))
            print("\n" + text(profiled(figures(trials[0].config, topology, trials[0].compiled), trials[0].compiled)))
        return 0 if trials[0].fits else 1
    config = with_mesh(args.config, sizes(args.config, topology))
    told(f"{config.title or 'run'} for {topology.name}")
    compiled = compile_step(config, topology, length=args.length)
    found = profiled(figures(config, topology, compiled), compiled)
    trials = [] if found["fits"] else mend(config, topology, **options)
    if args.json:
        print(to_json(found | ({"mend": trials_json(trials, topology)} if trials else {})))
    else:
        print(text(found))
        if trials:
            print("\nwhat was tried to make it fit\n" + trials_text(trials))
            print("" if trials[-1].fits else "\nnone of it does: take more chips, or a larger --tries")
    return 0 if found["fits"] else 1
