"""`tove import`: bring a CLIP, an export, a LLaVA or MoVE-KD's adapter file in, checked."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "bring a CLIP, an export, a LLaVA of either layout or MoVE-KD's mole_encoder.bin in: checked, as transformers loads it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("source", help="Folder, or hub id, of a CLIP, of an exported student, or of a LLaVA.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write.")
    parser.add_argument("--adapter", type=Path, help="MoVE-KD's mole_encoder.bin to put on top of the CLIP.")
    parser.add_argument(
        "--encoder-adapters", type=Path, help="MoVE-KD's encoder_adapter.bin, for a run that begins from the output."
    )
    parser.add_argument(
        "--plain", action="store_true", help="Leave LoRA experts out: a start for `student.initialize`."
    )
    parser.add_argument("--image-size", type=int, help="Resize position embeddings to this side, pixels.")
    whole = parser.add_argument_group("LLaVA")
    whole.add_argument("--layout", choices=("transformers", "original"), default="transformers", help="To write.")
    whole.add_argument("--language", help="Folder or hub id of the language model, where the weights have none.")
    whole.add_argument("--vision", help="Folder or hub id of the vision tower, in place of that in config.json.")
    whole.add_argument("--tokenizer", help="Folder or hub id of the tokenizer, where the source has none.")
    whole.add_argument("--template", default="v1", help="Template of conversations, for the processor.")


def run(args: argparse.Namespace) -> int:
    """Imports, writes and prints what came in."""
    from tove_jax.hf.convert import convert
    from tove_jax.hf.llava_convert import convert_llava, is_llava

    if is_llava(args.source):
        _refuse_options(args)
        names = ("layout", "language", "vision", "tokenizer", "template")
        lines = convert_llava(args.source, args.output, **{name: getattr(args, name) for name in names})
        print("\n".join(lines))
        return 0
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


def _refuse_options(args: argparse.Namespace) -> None:
    from tove_jax.errors import InputError

    for name in ("adapter", "encoder_adapters", "plain", "image_size"):
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')}: is for a CLIP, found a whole LLaVA in {args.source}")
