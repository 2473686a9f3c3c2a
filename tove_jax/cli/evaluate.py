"""`tove eval`: how good the student's features are, or, with ``--tasks``, what a model answers."""

from __future__ import annotations

import argparse
import contextlib

from tove_jax.cli.stored import of_run
from tove_jax.config.schema import Config
from tove_jax.files.remote import folder

HELP = "judge the student's features on held-out pictures, or a model's answers to published questions"
TAKES_CONFIG = True
PROCESSES = "together"


def settings(args: argparse.Namespace) -> Config:
    """Returns the run's settings; those of answering are options."""
    return Config() if args.tasks else of_run(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--step", type=int, help="A saved step; the newest when left out.")
    parser.add_argument(
        "--seeds", type=folder, nargs="+", default=[], metavar="WORKDIR",
        help="Folders of further runs of this setting; mean and spread go into this run's metrics.json.",
    )  # fmt: skip
    answers = parser.add_argument_group("answers to questions")
    answers.add_argument(
        "--tasks", nargs="+", action="extend", default=[], metavar="KIND[@NAME]=PATH[:PICTURES[:ANSWERS]]",
        help="Tasks by their published files, as pope=coco_pope_random.json:val2014; docs/evaluation.md lists them.",
    )  # fmt: skip
    answers.add_argument("--model", help="A run's folder, a Hugging Face folder or a hub id; --workdir when left out.")
    answers.add_argument("--limit", type=int, default=0, help="Questions of a task, spread evenly over it; 0: all.")
    answers.add_argument("--batch", type=int, default=16, help="Prompts, or choices that are ranked, at once.")
    answers.add_argument(
        "--prompts", default="llava",
        help="llava: LLaVA-1.5's requests; plain: questions as published; or a text with {question}.",
    )  # fmt: skip
    answers.add_argument("--choose", action="store_true", help="Answer by the likeliest choice in place of writing.")
    answers.add_argument("--candidates", default="", metavar="FILE", help="Answers to choose among, one a line.")
    answers.add_argument("--mean", action="store_true", help="Rank by log-likelihood per token.")
    answers.add_argument("--class-text", default="", metavar="TEXT", help="Text of a class, with {} for its name.")
    answers.add_argument("--unrotated", action="store_true", help="Ask MMBench's questions as they stand.")
    answers.add_argument("--new-tokens", type=int, default=0, help="Tokens of an answer at most; 0: the task's own.")
    answers.add_argument("--beams", type=int, default=1, help="Width of beam search; 1: greedy.")
    answers.add_argument("--resamples", type=int, default=1000, help="Of the bootstrap over pictures.")
    answers.add_argument("--experts", help="Of a ToVE run: attach these alone, by commas; an empty text attaches none.")
    answers.add_argument("--template", default="", help="Of the conversation; the model's own when left out.")
    answers.add_argument("--overwrite", action="store_true", help="Answer anew, whatever was answered before.")


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints a table."""
    from tove_jax.data.cache import cache_folder
    from tove_jax.errors import InputError
    from tove_jax.eval.run import evaluate_run, evaluate_runs
    from tove_jax.eval.runner import table
    from tove_jax.files import mirror
    from tove_jax.parallel import together

    if args.tasks:
        return _ask(args)
    if args.model is not None:
        raise InputError("--model: expected --tasks beside it; the student's features are judged by --workdir")
    if not args.seeds:
        metrics = evaluate_run(args.config, args.workdir, step=args.step)
        if together.is_first():
            print(table(metrics))
        return 0
    if args.step is not None:
        raise InputError("--step: expected no step beside --seeds, which takes each run's newest")
    with contextlib.ExitStack() as stack:
        cache = cache_folder(args.config.data.cache)
        seeds = [stack.enter_context(mirror.opened(run, cache, send=together.is_first())) for run in args.seeds]
        summary = evaluate_runs(args.config, [args.workdir, *seeds])
    if not together.is_first():
        return 0
    print(f"{summary['eval/seeds/count']} runs, mean and standard deviation:")
    for name, value in summary.items():
        if name.endswith("/mean"):
            spread = summary[name.removesuffix("mean") + "std"]
            print(f"{name.removeprefix('eval/seeds/').removesuffix('/mean'):32s} {value:8.4f} ± {spread:.4f}")
    return 0


def _ask(args: argparse.Namespace) -> int:
    """Answers the tasks and prints a table."""
    from tove_jax.errors import InputError
    from tove_jax.eval.answers import table
    from tove_jax.eval.ask_tasks import Model, ask_tasks
    from tove_jax.eval.tasks.captions import CLASS_TEXT
    from tove_jax.eval.tasks.registry import Options
    from tove_jax.files import mirror
    from tove_jax.parallel import together

    if args.seeds:
        raise InputError("--seeds: expected none beside --tasks; give each run its own --workdir")
    if args.model is None and args.workdir is None:
        raise InputError("--tasks: expected --model, or --workdir with a trained run")
    experts = None if args.experts is None else tuple(name for name in args.experts.split(",") if name)
    results = ask_tasks(
        Model(mirror.located(args.model or str(args.workdir)), args.step, experts, args.template),
        args.tasks,
        args.workdir,
        Options(
            prompts=args.prompts,
            choose=args.choose,
            candidates=args.candidates,
            mean=args.mean,
            class_text=args.class_text or CLASS_TEXT,
            rotate=not args.unrotated,
            new_tokens=args.new_tokens,
        ),
        limit=args.limit,
        batch=args.batch,
        beams=args.beams,
        resamples=args.resamples,
        overwrite=args.overwrite,
    )
    if together.is_first():
        print(table(results))
        for result in results:
            print(f"every answer to {result.task}: {result.answers}")
    return 0
