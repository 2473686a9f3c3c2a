"""`tove ask`: asks a model about a picture, and prints its answer."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "ask a run, or a Hugging Face folder of a LLaVA, about a picture; the answer goes to the terminal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("question", nargs="*", help="What is asked; several questions are answered one by one.")
    parser.add_argument("--model", required=True, help="A run's folder, a Hugging Face folder, or a hub id.")
    parser.add_argument("--image", type=Path, action="append", default=[], help="A picture; give it again for more.")
    parser.add_argument("--step", type=int, help="A saved step of the run; the newest unless told.")
    parser.add_argument("--experts", help="Of a ToVE run: attach these alone, by commas; an empty text attaches none.")
    parser.add_argument("--template", default="", help="Of the conversation; that of the run, or v1.")
    parser.add_argument("--choices", help="Rank these answers by likelihood, by commas, in place of writing one.")
    parser.add_argument("--new-tokens", type=int, default=128, help="Tokens of an answer at most.")
    parser.add_argument("--beams", type=int, default=1, help="Width of beam search.")
    parser.add_argument("--temperature", type=float, help="Draw the answer, with this temperature.")
    parser.add_argument("--top-p", type=float, default=1.0, help="Draw among the likeliest that hold so much.")
    parser.add_argument("--seed", type=int, default=0, help="Of drawing.")


def run(args: argparse.Namespace) -> int:
    """Answers, a line a question; with several questions each is printed before its answer."""
    from tove_jax.data.decode import read_picture
    from tove_jax.eval.answerers import open_answerer
    from tove_jax.files import mirror
    from tove_jax.language.decode import Decoding

    experts = None if args.experts is None else [name for name in args.experts.split(",") if name]
    pictures = [read_picture(path) for path in args.image]
    model = open_answerer(
        mirror.located(args.model), step=args.step, experts=experts, template=args.template, seed=args.seed
    )
    questions = args.question or [""]
    if args.choices is not None:
        choices = [text.strip() for text in args.choices.split(",")]
        for question, told in zip(
            questions, model.rank([pictures] * len(questions), questions, [choices] * len(questions)), strict=True
        ):
            if len(questions) > 1:
                print(question)
            for score, text in sorted(zip(told.tolist(), choices, strict=True), reverse=True):
                print(f"{score:9.3f}  {text}")
        return 0
    decoding = Decoding(
        args.new_tokens,
        sample=args.temperature is not None,
        temperature=1.0 if args.temperature is None else args.temperature,
        top_p=args.top_p,
        beams=args.beams,
    )
    for question in questions:
        answer = model.answer([pictures], [question], decoding)[0]
        print(f"{question}\n  {answer}" if len(questions) > 1 else answer)
    return 0
