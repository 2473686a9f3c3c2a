"""`tove features`: look into feature stores, join them, drop what is no longer wanted."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from tove_jax.cli.stored import of_run
from tove_jax.config.schema import Config
from tove_jax.errors import InputError

HELP = "list, verify, measure, join or prune stored features"
TAKES_CONFIG = True
_ACTIONS = {
    "ls": "a line a store",
    "verify": "read every record",
    "stats": "moments, and what codecs cost and lose; with a run's settings also the change of its loss",
    "sizes": "bytes of a picture's features under each codec, of a config's experts as published; reads no store",
    "merge": "join stores of one expert into one",
    "prune": "drop records that are not among a config's pictures, and stores of experts that it does not name",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument(
        "action", choices=tuple(_ACTIONS), help="; ".join(f"{name}: {text}" for name, text in _ACTIONS.items()) + "."
    )
    parser.add_argument(
        "path", type=Path, nargs="*", metavar="PATH", help="Stores, a features folder or a run's folder."
    )
    parser.add_argument("--records", type=int, default=64, help="Records on which stats measures the codecs.")
    parser.add_argument("--codecs", nargs="+", metavar="CODEC", help="Codecs that stats and sizes measure.")
    parser.add_argument("--into", type=Path, help="New folder for merge.")
    parser.add_argument("--delete", action="store_true", help="Let prune delete; it only tells otherwise.")


def settings(args: argparse.Namespace) -> Config:
    """Returns the settings of ``--workdir``'s run, or the defaults, which stand for none."""
    if args.workdir is None:
        return Config()
    return of_run(args)


def run(args: argparse.Namespace) -> int:
    """Does what was asked; 1 when `verify` found a fault."""
    if args.action == "merge":
        return _merge(args)
    if args.action == "sizes":
        return _sizes(args)
    if args.action == "prune":
        return _prune(args)
    if args.action == "stats" and not args.path and args.workdir is not None:
        return _losses(args)
    from tove_jax.experts import statistics, store

    if not args.path:
        raise InputError("expected the path of a store, a features folder or a run's folder")
    faults = 0
    for path in [found for given in args.path for found in store.find_stores(given)]:
        if args.action == "ls":
            print(store.summary(path))
        elif args.action == "stats":
            print(statistics.statistics(path, args.records, args.codecs or statistics.CODECS))
        else:
            sound, problems = store.verify_store(path)
            for problem in problems:
                print(problem)
            print(f"{path}: {sound} sound records, {len(problems)} faults")
            faults += len(problems)
    return 1 if faults else 0


def _losses(args: argparse.Namespace) -> int:
    from tove_jax.eval import codec_loss

    chosen = args.codecs or codec_loss.SETTINGS
    print(codec_loss.table(codec_loss.codec_losses(args.config, args.workdir, chosen, args.records)))
    return 0


def _sizes(args: argparse.Namespace) -> int:
    from tove_jax.eval import codec_loss

    print(codec_loss.size_table(args.config, args.codecs or codec_loss.SETTINGS))
    return 0


def _merge(args: argparse.Namespace) -> int:
    from tove_jax.experts import manage, store

    if args.into is None:
        raise InputError("merge: expected --into=FOLDER")
    manage.merge(args.path, args.into)
    print(store.summary(args.into))
    return 0


def _prune(args: argparse.Namespace) -> int:
    from tove_jax.experts.manage import prune, unwanted

    if args.workdir is None:
        raise InputError("prune: expected --config, --workdir or both")
    for path, ids in unwanted(args.config, args.workdir).items():
        if ids is None:
            print(f"{path}: not of an expert of this config: the whole store")
            if args.delete:
                shutil.rmtree(path)
        else:
            print(f"{path}: {len(ids)} records of other pictures")
            if args.delete:
                prune(path, lambda id, ids=ids: id not in ids)  # type: ignore[misc]
    if not args.delete:
        print("nothing was deleted; --delete does it")
    return 0
