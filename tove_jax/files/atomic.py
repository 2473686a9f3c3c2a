"""Writes files and folders whole or not at all.

Everything is written to a temporary name beside its target, synced to disk and renamed. The temporary
name tells the machine and the process, so that what a killed process left behind is removed by the next
writer of the same target, while that of a living process, or of another machine, is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tove_jax.errors import InputError

# What the user can mend: a full or read-only disk, a missing right, a path through a file.
_MENDABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.EEXIST,
}  # fmt: skip
_HOST = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname()) or "host"
_active: set[str] = set()


def _temporary(path: Path, ending: str) -> Path:
    return path.parent / f".{path.name}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.{ending}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _clean_up(path: Path) -> None:
    """Removes what killed writers of `path` left; brings an old folder back if they stopped mid-swap."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{_HOST}-(\d+)-[0-9a-f]{{8}}\.(tmp|old)")
    with contextlib.suppress(OSError):
        for entry in sorted(path.parent.iterdir()):
            match = pattern.fullmatch(entry.name)
            if not match or entry.name in _active:
                continue
            pid = int(match[1])
            if pid != os.getpid() and _alive(pid):
                continue
            if match[2] == "old" and not path.exists():
                os.rename(entry, path)
            else:
                _remove(entry)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _mendable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        named = Path(error.filename) if isinstance(error.filename, str | os.PathLike) else path
        related = named.is_relative_to(path.parent) or path.is_relative_to(named)
        if error.errno in _MENDABLE and related:  # not, say, an input the body failed to open
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        raise


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Writes a file whole or not at all, replacing an older one.

    Missing parent folders are made. After a failure the older file is as it was and no temporary file
    is left.

    Args:
      path: target.
      data: content.

    Raises:
      InputError: full disk, folder that cannot be written; names the path and the reason.
    """
    path = Path(path)
    with _mendable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(path)
        temporary = _temporary(path, "tmp")
        _active.add(temporary.name)
        try:
            with open(temporary, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            _remove(temporary)
            _active.discard(temporary.name)


def atomic_write_json(path: Path | str, value: Any, *, indent: int | None = 2) -> None:
    """Writes a value as JSON (UTF-8, keys in the given order, newline at the end), whole or not at all.

    Raises:
      InputError: as `atomic_write_bytes`.
      TypeError, ValueError: the value is not JSON (NaN and infinity are not).
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode())


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Gives a temporary folder beside `path`; on success it becomes `path`, replacing an older folder.

    On an exception the temporary folder is removed and an older folder at `path` stays as it was. The
    caller decides whether an existing folder may be replaced: all of it goes. Between the two renames
    of a replacement `path` is missing for a moment; a kill there is mended by the next writer.

    Args:
      path: target folder.

    Yields:
      The temporary folder, empty.

    Raises:
      InputError: `path` is a file, full disk (also inside the body), folder that cannot be written.
    """
    path = Path(path)
    with _mendable(path):
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(path)
        if path.is_file():  # one look: another writer may be between its two renames
            raise InputError(f"{path}: expected a folder or nothing, found a file")
        temporary = _temporary(path, "tmp")
        names = {temporary.name}
        done = False
        _active.add(temporary.name)
        try:
            temporary.mkdir()
            yield temporary
            for folder, _, files in os.walk(temporary):
                for name in files:
                    _sync(Path(folder) / name)
                _sync(Path(folder))
            while not _moved(temporary, path):
                old = _temporary(path, "old")
                names.add(old.name)
                _active.add(old.name)
                with contextlib.suppress(FileNotFoundError):  # another writer has just moved it away
                    os.rename(path, old)
            done = True
            _sync(path.parent)
        finally:
            _remove(temporary)
            for name in names:
                # Short of success an older folder is kept unless there is a newer one.
                if done or path.exists():
                    _remove(path.parent / name)
            _active.difference_update(names)


def _moved(source: Path, target: Path) -> bool:
    """Renames a folder; returns False where a folder that is not empty stands in the way."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True
