"""`tove bench`: how fast training, adapters, decoders, extraction, exports, input and starts are here, beside torch."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HELP = "time training steps beside torch, adapters, decoders, extraction, exports, input and starts on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--suite", default="cpu", metavar="cpu|gpu|input", help="Sizes that suit the device.")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="A section, or part of a case's name; repeatable."
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="Also write everything there.")
    parser.add_argument("--minutes", type=float, default=0.0, help="End in an orderly way after so many; 0: no limit.")
    parser.add_argument("--after", type=Path, metavar="FILE.json", help="Leave out the cases measured there.")
    parser.add_argument("--small", action="store_true", help="Tiny shapes: shows that it works, measures nothing.")
    parser.add_argument(
        "--folder",
        help="Where the sections input, which measures its disk, and start write; the temporary folder if left out.",
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables, stores JSON; 1 where nothing could be measured, 2 where sides differ in what they compute."""
    # Torch takes its turns on the same device, so neither may take all of its memory beforehand.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from tove_jax.bench.run import bench, command_line, earlier, text, to_json
    from tove_jax.errors import InputError
    from tove_jax.files.atomic import atomic_write_bytes

    if args.output is not None and not args.output.parent.is_dir():
        raise InputError(f"--output: no folder {args.output.parent}")
    found = bench(
        args.suite,
        only=args.only,
        small=args.small,
        minutes=args.minutes,
        folder=args.folder,
        after=None if args.after is None else earlier(args.after),
        command=command_line(),
        told=lambda line: print(f"bench: {line}", file=sys.stderr),
    )
    print(text(found), end="")
    if args.output is not None:
        atomic_write_bytes(args.output, to_json(found))
    return 2 if found["wrong"] else 0 if found["rows"] else 1
