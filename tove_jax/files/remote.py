"""Files of object stores, read through local copies: ``gs://``, ``s3://`` and whatever else fsspec opens.

A file is copied once and kept; it is copied again when its size or its version in the store changes. What is written
to a store is written by `tove_jax.files.mirror`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tove_jax.errors import InputError
from tove_jax.files.atomic import atomic_write_json
from tove_jax.files.bucket import open_system, telling

_BLOCK = 8 << 20
_THREADS = 8
# What file systems call the version of an object, the surest first.
_VERSIONS = ("md5Hash", "ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "updated", "created")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of an object store."""
    return "://" in str(path)


def folder(text: str) -> Path | str:
    """Returns a folder as it was given: a path, or text for one of an object store, which a path would spoil."""
    return text if is_remote(text) else Path(text)


def disk_folder(text: str) -> Path:
    """Returns a folder that must be on a file system, for commands that lock files in it; ValueError otherwise."""
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{text}: expected a folder of a file system: its runs are divided by locks")
    return Path(text)


def cache_folder(configured: str = "") -> Path:
    """Returns the cache folder: `configured`, or ``tove_jax`` in the user's cache (XDG_CACHE_HOME)."""
    if configured:
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "tove_jax"


def parent(path: str) -> str:
    """Returns the folder of a path, local or of an object store."""
    return path.rpartition("/")[0] if is_remote(path) else str(Path(path).parent)


@functools.lru_cache(256)
def local(path: str, cache: Path, missing: bool = False) -> Path:
    """Returns a local path with a file's or folder's content, which is copied first where it is remote.

    Once a process: what changes in the store afterwards is seen by the next one. Processes may copy the same at once.

    Args:
      path: a local path, which is returned as it is, or one of an object store.
      cache: folder for the copies.
      missing: where nothing is there, return a path at which nothing is either.

    Raises:
      InputError: nothing there and `missing` is false, a store that cannot be read, or no library for it.
    """
    if not is_remote(path):
        return Path(path)
    return copied(path, cache, missing)


def target_of(path: str, cache: Path) -> Path:
    """Returns where the copy of a remote path lies, or will."""
    path = path.rstrip("/")
    return cache / "remote" / hashlib.sha256(path.encode()).hexdigest()[:16] / path.rpartition("/")[2]


def copied(path: str, cache: Path, missing: bool = False, chosen: Callable[[str], bool] = lambda name: True) -> Path:
    """Copies a remote file or folder, as it is now, or what is chosen of it by name; see `local`."""
    found, system, root = _found(path)
    target = target_of(path, cache)
    if not found and missing:
        return target
    if not found:
        raise InputError(f"{path}: nothing there")
    listing = target.parent / f".{target.name}.json"
    known = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else {}
    files = {name: about for name, about in found.items() if chosen(name)}
    versions = {name: _version(about) for name, about in files.items()}
    wanted = [name for name in files if known.get(name) != versions[name] or not (target / name).is_file()]
    total = sum(files[name]["size"] or 0 for name in wanted)
    with tqdm(total=total, desc=f"copying {path}", unit="B", unit_scale=True, disable=not wanted, leave=False) as bar:
        with ThreadPoolExecutor(_THREADS) as pool:
            copies = [pool.submit(_copy, system, root, name, files[name], target, bar) for name in wanted]
            for one in copies:
                one.result()
    if wanted:
        atomic_write_json(listing, {**known, **versions})
    return target


def remember(path: str, cache: Path) -> None:
    """Takes what was sent from the copy of a remote folder for copied, so that it is not copied back."""
    found, _, _ = _found(path)
    target = target_of(path, cache)
    listing = target.parent / f".{target.name}.json"
    known = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else {}
    for name, about in found.items():
        if (target / name).is_file() and (target / name).stat().st_size == about["size"]:
            known[name] = _version(about)
    atomic_write_json(listing, known)


def _found(path: str) -> tuple[dict[str, dict[str, Any]], Any, str]:
    """Returns what is below a path (the name is empty for a file), its file system, and the path there."""
    system, root = open_system(path)
    with telling(path, "cannot be read"):
        found = system.find(root, detail=True) if system.exists(root) else {}
    return {name[len(root) :].lstrip("/"): about for name, about in found.items()}, system, root


def _version(about: dict[str, Any]) -> list[str]:
    marks = [str(about[name]) for name in _VERSIONS if about.get(name) is not None]
    return [str(about["size"]), *marks[:1]]


def _copy(system: Any, root: str, name: str, about: dict[str, Any], target: Path, bar: Any) -> None:
    """Copies one file whole or not at all."""
    path = target / name if name else target
    source = f"{root}/{name}" if name else root
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with telling(source, f"cannot be copied to {path}"):
            with system.open(source, "rb") as stream, partial.open("wb") as out:
                while block := stream.read(_BLOCK):
                    out.write(block)
                    bar.update(len(block))
        found = partial.stat().st_size
        if about["size"] is not None and found != about["size"]:
            raise InputError(f"{source}: expected {about['size']} bytes, found {found}: it was cut short or replaced")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
