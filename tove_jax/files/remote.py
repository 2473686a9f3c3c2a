"""Files of object stores, read through local copies: ``gs://``, ``s3://`` and whatever else fsspec opens.

A file is copied once and kept; it is copied again when its size or its version in the store changes. Nothing is
written to a store from here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tove_jax.errors import InputError
from tove_jax.files.atomic import atomic_write_json

_BLOCK = 8 << 20
_THREADS = 8
# What file systems call the version of an object, the surest first.
_VERSIONS = ("md5Hash", "ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "updated", "created")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of an object store."""
    return "://" in str(path)


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
    files, system, root = _found(path)
    target = cache / "remote" / hashlib.sha256(path.rstrip("/").encode()).hexdigest()[:16] / Path(root).name
    if not files and missing:
        return target
    if not files:
        raise InputError(f"{path}: nothing there")
    listing = target.parent / f".{target.name}.json"
    known = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else {}
    versions = {name: _version(about) for name, about in files.items()}
    wanted = [name for name in files if known.get(name) != versions[name] or not (target / name).is_file()]
    total = sum(files[name]["size"] or 0 for name in wanted)
    with tqdm(total=total, desc=f"copying {path}", unit="B", unit_scale=True, disable=not wanted, leave=False) as bar:
        with ThreadPoolExecutor(_THREADS) as pool:
            copies = [pool.submit(_copy, system, root, name, files[name], target, bar) for name in wanted]
            for one in copies:
                one.result()
    if wanted:
        atomic_write_json(listing, versions)
    return target


def _found(path: str) -> tuple[dict[str, dict[str, Any]], Any, str]:
    """Returns what is below a path (the name is empty for a file), its file system, and the path there."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(path)
        root = root.rstrip("/")
        found = system.find(root, detail=True) if system.exists(root) else {}
    except ImportError as error:
        raise InputError(f"{path}: {error}; install tove_jax with the extra `cloud`") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
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
        with system.open(source, "rb") as stream, partial.open("wb") as out:
            while block := stream.read(_BLOCK):
                out.write(block)
                bar.update(len(block))
        found = partial.stat().st_size
        if about["size"] is not None and found != about["size"]:
            raise InputError(f"{source}: expected {about['size']} bytes, found {found}: it was cut short or replaced")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{source}: cannot be copied to {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
