"""A folder of an object store: whole objects are written, read and listed, with errors that name the path."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tove_jax.errors import InputError

THREADS = 8
"""Objects on their way at a time."""
# What a scheme needs, by the name of setup.py's extra.
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}


@contextlib.contextmanager
def telling(path: str, what: str) -> Iterator[None]:
    """Turns what a store says into an InputError: each library has kinds of its own, not all of them OSErrors.

    Args:
      path: of the store, for the error.
      what: could not be done, as "cannot be read".
    """
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        package = _PACKAGES.get(path.partition("://")[0])
        named = f"{package} has to be installed" if package else str(error)
        raise InputError(f"{path}: {named}; install tove_jax with the extra `cloud`") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
        raise InputError(f"{path}: {what}: {reason}") from error


def open_system(path: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a path, without memory of what it listed, and the path there.

    Raises:
      InputError: an unknown scheme, or one whose package is not installed.
    """
    import fsspec

    options = {"auto_mkdir": True} if path.startswith(("file://", "local://")) else {}
    with telling(path, "cannot be opened"):
        system, root = fsspec.core.url_to_fs(path, use_listings_cache=False, **options)
    return system, root.rstrip("/")


class Bucket:
    """Objects below one path of a store, named relative to it.

    Safe to use from several threads. A write is seen whole or not at all, as object stores have it.

    Args:
      url: as ``gs://bucket/runs/one``.

    Raises:
      InputError: an unknown scheme, or one whose package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._system, self._root = open_system(self.url)

    def below(self, name: str) -> Bucket:
        """Returns a folder of this one."""
        return Bucket(f"{self.url}/{name}")

    def sizes(self, below: str = "") -> dict[str, int]:
        """Returns all objects and their sizes in bytes, of a folder when told; names are relative to this one."""
        root = f"{self._root}/{below}" if below else self._root
        with telling(f"{self.url}/{below}".rstrip("/"), "cannot be listed"):
            self._system.invalidate_cache()
            try:
                found = self._system.find(root, detail=True)
            except FileNotFoundError:
                return {}
        start = len(self._root) + 1
        return {name[start:]: int(about["size"] or 0) for name, about in found.items() if len(name) > start}

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes | None:
        """Returns an object's bytes, or those of a range; None where there is no such object."""
        with telling(f"{self.url}/{name}", "cannot be read"):
            try:
                return bytes(self._system.cat_file(f"{self._root}/{name}", start=start, end=end))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Writes an object, replacing an older one."""
        with telling(f"{self.url}/{name}", "cannot be written"):
            self._system.pipe_file(f"{self._root}/{name}", data)

    def send(self, path: Path, name: str) -> None:
        """Writes a file's content as an object."""
        with telling(f"{self.url}/{name}", "cannot be written"):
            self._system.put_file(str(path), f"{self._root}/{name}")

    def fetch(self, name: str, path: Path) -> None:
        """Writes an object's content as a file, whose folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with telling(f"{self.url}/{name}", f"cannot be copied to {path}"):
            self._system.get_file(f"{self._root}/{name}", str(path))

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there are left out."""
        for name in names:
            with telling(f"{self.url}/{name}", "cannot be removed"), contextlib.suppress(FileNotFoundError):
                self._system.rm_file(f"{self._root}/{name}")


def all_at_once(call: Any, arguments: Iterable[Any]) -> list[Any]:
    """Calls a function for each argument, several at a time; the first error is raised after all have ended."""
    with ThreadPoolExecutor(THREADS) as pool:
        return [future.result() for future in [pool.submit(call, one) for one in arguments]]
