"""`tove COMMAND ...`: finds the command, opens the config door, prints a user's errors plainly."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from tove_jax.errors import InputError, NonFiniteError, nearest
from tove_jax.files.compiled import keep_compiled
from tove_jax.files.remote import folder, is_remote

# Command -> module; loaded only when called, so that `tove --help` starts no JAX.
COMMANDS = {
    "data": "data",
    "experts": "experts",
    "extract": "extract",
    "features": "features",
    "train": "train",
    "eval": "evaluate",
    "ask": "ask",
    "detach": "detach",
    "merge": "merge",
    "compare": "compare",
    "sweep": "sweep",
    "plan": "plan",
    "bench": "bench",
    "export": "export",
    "verify": "verify",
    "import": "import_",
    "report": "report",
}
# In how many processes a command may run: `together` they step and save as one, `alone` each does its share of the work.
TOGETHER, ALONE = "together", "alone"


def _module(command: str) -> Any:
    return importlib.import_module(f"tove_jax.cli.{COMMANDS[command]}")


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; those of the process when None.

    Returns:
      The exit status: 0 done, 1 a check failed, 2 bad input or a failing disk, 3 a loss that is not
      finite, 75 another process was lost and the command may be started again, 130 or 143 stopped by a signal.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: tove COMMAND [options]; `tove COMMAND --help` says more\n")
        for name in COMMANDS:
            print(f"  {name:10s} {_module(name).HELP}")
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        print(f"tove: no command '{command}'{nearest(command, COMMANDS)}", file=sys.stderr)
        return 2
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    keep_compiled()
    module, parser = parser_of(command)
    overrides = [word for word in rest if parser.epilog and word.startswith("--config.")]
    args = parser.parse_args([word for word in rest if word not in overrides])
    try:
        if processes := getattr(module, "PROCESSES", ""):
            return _among_processes(module, args, overrides, parser.prog, processes)
        return _run(module, args, overrides, parser.prog)
    except KeyboardInterrupt:
        print(f"tove {command}: interrupted", file=sys.stderr)
        return 130
    except (InputError, OSError, NonFiniteError) as error:
        print(f"tove {command}: {error}", file=sys.stderr)
        return _status(error)


def parser_of(command: str) -> tuple[Any, argparse.ArgumentParser]:
    """Returns a command's module and the parser of all its options but ``--config.SECTION.FIELD``."""
    module = _module(command)
    parser = argparse.ArgumentParser(prog=f"tove {command}", description=module.HELP, allow_abbrev=False)
    takes_config = getattr(module, "TAKES_CONFIG", False)
    # Where a command finds settings without a file: those of a run that is there.
    settings = getattr(module, "settings", None)
    if takes_config:
        otherwise = "" if settings is None else "; the run's own settings when left out"
        parser.add_argument(
            "--config", required=settings is None, metavar="FILE.py[:ARGUMENT]", help=f"Config file{otherwise}."
        )
        parser.add_argument(
            "--workdir",
            type=folder,
            help="Run folder, also of an object store (gs://, s3://); runs/<the config's title> when left out.",
        )
    if takes_config or settings is not None:
        parser.epilog = "Single settings: --config.SECTION.FIELD=VALUE"
    if getattr(module, "PROCESSES", ""):
        group = parser.add_argument_group("several processes", "found by themselves on TPUs, in Slurm and by launch/")
        group.add_argument("--coordinator", metavar="HOST:PORT", help="Where process 0 listens.")
        group.add_argument("--process-id", type=int, metavar="I", help="This process, from 0.")
        group.add_argument("--process-count", type=int, metavar="N", help="All processes; 1: look for no others.")
    module.add_arguments(parser)
    return module, parser


def _run(module: Any, args: argparse.Namespace, overrides: list[str], where: str) -> int:
    settings = getattr(module, "settings", None)
    given = getattr(module, "TAKES_CONFIG", False) and args.config
    if given:
        from tove_jax.config import from_file

        args.config = from_file(args.config, overrides)
        args.workdir = args.workdir or Path("runs") / (args.config.title or "run")
    place = None
    with contextlib.ExitStack() as opened:
        if is_remote(getattr(args, "workdir", None) or ""):
            from tove_jax.data.cache import cache_folder
            from tove_jax.files import mirror

            first = getattr(args, "processes", None) is None or args.processes.index == 0
            cache = cache_folder(args.config.data.cache if given else "")
            place = args.workdir if first else None
            args.workdir = opened.enter_context(mirror.opened(args.workdir, cache, send=first))
        if not given and settings is not None:
            from tove_jax.config import with_overrides

            args.config = with_overrides(settings(args), overrides, where)
        status = module.run(args) or 0
    if place is not None:
        print(f"{where}: {place} has what was written", file=sys.stderr)
    return status


def _among_processes(module: Any, args: argparse.Namespace, overrides: list[str], where: str, processes: str) -> int:
    """Runs a command as one of perhaps several processes, which end together when one of them cannot go on."""
    from tove_jax.parallel import start, together

    args.processes = start.start(args.coordinator, args.process_id, args.process_count, alone=processes == ALONE)
    if not together.several():
        return _run(module, args, overrides, where)
    together.watch()
    try:
        return _run(module, args, overrides, where)
    except (InputError, OSError, NonFiniteError) as error:
        print(f"{where}: process {args.processes.index}: {error}", file=sys.stderr)
        together.leave(_status(error), str(error))
    except KeyboardInterrupt:
        together.leave(130, "interrupted")
    except Exception as error:
        together.lost(error)
    return 1


def _status(error: Exception) -> int:
    return 3 if isinstance(error, NonFiniteError) else 2


if __name__ == "__main__":
    sys.exit(main())
