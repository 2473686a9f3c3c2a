"""`tove verify`: prove that an exported folder gives our numbers in transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "compare an exported folder in JAX and in transformers, print weight hashes; status 1 when they differ"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("folder", type=Path, help="What `tove export` wrote, a CLIP, or a LLaVA.")


def run(args: argparse.Namespace) -> int:
    """Verifies and prints the report."""
    from tove_jax.hf.llava_convert import is_llava
    from tove_jax.hf.verify import verify
    from tove_jax.language.verify import verify_llava

    whole = args.folder.is_dir() and is_llava(args.folder)
    report = verify_llava(args.folder) if whole else verify(args.folder)
    print("\n".join(report.lines()))
    return 0 if report.ok else 1
