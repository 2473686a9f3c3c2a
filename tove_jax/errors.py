"""Errors that a user can mend, told apart from faults of the program."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something given from outside is wrong: a file, a field, an array.

    The message names the thing, what was expected and what was found. The command line prints it
    without a traceback and exits with status 2.
    """


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite; the message names step, records and checkpoint.

    The command line prints it without a traceback and exits with status 3.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `` (did you mean 'x'?)`` for the closest known name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
