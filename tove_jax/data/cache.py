"""Where rendered pictures and tar indices are kept between runs, and how they are made once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tove_jax.errors import InputError
from tove_jax.files.remote import cache_folder as cache_folder


def content_key(**parts: Any) -> str:
    """Returns a short hash of JSON-ready parts, for the name of a cached file."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Holds a lock beside `path`, so that of several processes one makes it and the others wait.

    The lock goes with the process that holds it, however that ends. On a file system without locks
    it is not held: the work is then done twice, and writing by renaming keeps the result whole.

    Raises:
      InputError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; data.cache names another folder") from error
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
