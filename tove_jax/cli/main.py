"""`tove COMMAND ...`: finds the command, opens the config door, prints a user's errors plainly."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from tove_jax.errors import InputError, NonFiniteError, nearest

# Command -> module; loaded only when called, so that `tove --help` starts no JAX.
COMMANDS = {
    "data": "data",
    "experts": "experts",
    "extract": "extract",
    "features": "features",
    "train": "train",
    "eval": "evaluate",
    "detach": "detach",
    "merge": "merge",
    "compare": "compare",
    "export": "export",
    "verify": "verify",
    "import": "import_",
    "report": "report",
}


def _module(command: str) -> Any:
    return importlib.import_module(f"tove_jax.cli.{COMMANDS[command]}")


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; those of the process when None.

    Returns:
      The exit status: 0 done, 1 a check failed, 2 bad input or a failing disk, 3 a loss that is not
      finite, 130 or 143 stopped by a signal.
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
        parser.add_argument("--workdir", type=Path, help="Run folder; runs/<the config's title> when left out.")
    if takes_config or settings is not None:
        parser.epilog = "Single settings: --config.SECTION.FIELD=VALUE"
    module.add_arguments(parser)
    overrides = [word for word in rest if parser.epilog and word.startswith("--config.")]
    args = parser.parse_args([word for word in rest if word not in overrides])
    try:
        if takes_config and args.config:
            from tove_jax.config import from_file

            args.config = from_file(args.config, overrides)
            args.workdir = args.workdir or Path("runs") / (args.config.title or "run")
        elif settings is not None:
            from tove_jax.config import with_overrides

            args.config = with_overrides(settings(args), overrides, f"tove {command}")
        return module.run(args) or 0
    except InputError as error:
        print(f"tove {command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tove {command}: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"tove {command}: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print(f"tove {command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
