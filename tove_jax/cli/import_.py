"""`tove import`: bring a Hugging Face folder or MoVE-KD's adapter file back, checked."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "bring a CLIP, an exported student or MoVE-KD's mole_encoder.bin in: checked, as an export or a plain start"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("source", help="Folder, or hub id, of a CLIP or of an exported student.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write.")
    parser.add_argument("--adapter", type=Path, help="MoVE-KD's mole_encoder.bin to put on top of the CLIP.")
    parser.add_argument(
        "--encoder-adapters", type=Path, help="MoVE-KD's encoder_adapter.bin, for a run that begins from the output."
    )
    parser.add_argument(
        "--plain", action="store_true", help="Leave LoRA experts out: a start for `student.initialize`."
    )
    parser.add_argument("--image-size", type=int, help="Resize position embeddings to this side, pixels.")


def run(args: argparse.Namespace) -> int:
    """Imports, writes and prints what came in."""
    from tove_jax.hf.convert import convert

    for line in convert(
        args.source,
        args.output,
        adapter=args.adapter,
        encoder_adapters=args.encoder_adapters,
        plain=args.plain,
        image_size=args.image_size,
    ):
        print(line)
    return 0
