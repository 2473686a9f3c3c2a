"""A run's folder in an object store, worked on in a local folder: what it needs comes first, what changed goes back.

The small files of a run (settings, metrics, start, tokenizer, results, exports) are copied to a local folder, in which
every command works as ever. The object ``.files.json`` says which of them are whole, and is written last: of a folder
that is written as one, such as ``start`` or ``export``, nothing is listed while some of it is on its way. Checkpoints
are not mirrored: they go to the store by themselves (`tove_jax.train.stored`), and so do features.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tove_jax.errors import InputError
from tove_jax.files import remote
from tove_jax.files.bucket import Bucket, all_at_once
from tove_jax.files.remote import is_remote

LISTING = ".files.json"
# Their files are written one by one, each whole by itself.
_LOOSE = ("eval", "tensorboard")
# What processes give each other by `share`.
_PASSED = ".passed"
# Written for others; whoever reads a run has no use for them.
_EXPORTS = ("export", "released", "llava")
_HOST = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname()) or "host"
_SMALL = 64 << 20

_open: dict[Path, Mirror] = {}
_held: list[int] = []


class Mirror:
    """The local copy of a run's folder.

    Attributes:
      bucket: the run's folder in its store.
      folder: the local one.
    """

    def __init__(self, bucket: Bucket, folder: Path) -> None:
        self.bucket, self.folder = bucket, folder
        self._known: dict[str, tuple[int, int]] = {}
        self._listed: dict[str, int] = {}
        self._lock = threading.Lock()

    def pull(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Copies what the store has whole and is wanted, by name.

        Raises:
          InputError: a listed file of a folder is gone or has another size.
        """
        listed = read_listing(self.bucket)
        self._listed = listed

        def one(name: str) -> None:
            path = self.folder / name
            if _together(name):
                self.bucket.fetch(name, path)
                if path.stat().st_size != listed[name]:
                    raise InputError(
                        f"{self.bucket.url}/{name}: expected {listed[name]} bytes, found {path.stat().st_size}: "
                        "it was cut short or replaced"
                    )
            elif (data := self.bucket.read(name)) is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

        all_at_once(one, [name for name in listed if wanted(name)])
        self._known = {name: found for name, found in self._scan().items() if name in listed}

    def push(self) -> None:
        """Sends what changed here since it was last alike; what was removed here is removed there."""
        with self._lock:
            present = self._scan()
            changed = [name for name, found in present.items() if self._known.get(name) != found]
            gone = [name for name in self._known if name not in present]
            if not changed and not gone:
                return
            folders = {name.partition("/")[0] for name in (*changed, *gone) if _together(name)}
            kept = {name: size for name, size in self._listed.items() if name.partition("/")[0] not in folders}
            if len(kept) < len(self._listed):
                self._list(kept)
            sizes = dict(zip(changed, all_at_once(self._send, changed), strict=True))
            same = {name: self._listed[name] for name in self._known if name in self._listed and name not in gone}
            self._list({**same, **sizes})
            self.bucket.remove(gone)
            self._known = present

    def _list(self, sizes: dict[str, int]) -> None:
        self.bucket.write(LISTING, (json.dumps({"files": sizes}, indent=1, sort_keys=True) + "\n").encode())
        self._listed = sizes

    def _send(self, name: str) -> int:
        path = self.folder / name
        if path.stat().st_size > _SMALL:
            self.bucket.send(path, name)
            return path.stat().st_size
        data = path.read_bytes()  # one that grows meanwhile is sent as it was
        self.bucket.write(name, data)
        return len(data)

    def _scan(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in sorted(files):
                if file.startswith(".") or file.endswith((".lock", ".partial", ".tmp")):
                    continue
                path = Path(folder) / file
                with contextlib.suppress(FileNotFoundError):
                    about = path.stat()
                    found[path.relative_to(self.folder).as_posix()] = about.st_size, about.st_mtime_ns
        return found


def _together(name: str) -> bool:
    """Whether a file belongs to a folder that is whole or not there."""
    top, slash, _ = name.partition("/")
    return bool(slash) and top not in _LOOSE


def read_listing(bucket: Bucket) -> dict[str, int]:
    """Returns which files of a run are whole in the store, with their sizes; empty where there is no run.

    Raises:
      InputError: the listing is damaged, or the store cannot be read.
    """
    text = bucket.read(LISTING)
    if text is None:
        return {}
    try:
        files = json.loads(text)["files"]
        found = {str(name): int(size) for name, size in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{bucket.url}/{LISTING}: not a listing of ours: {error}") from error
    for name in found:
        if name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"{bucket.url}/{LISTING}: expected names below the run's folder, found {name!r}")
    return found


def bucket_of(folder: Path | str) -> Bucket | None:
    """Returns where a local folder's run lies in an object store; None for one that is no mirror."""
    mirror = mirror_of(folder)
    return None if mirror is None else mirror.bucket


def mirror_of(folder: Path | str) -> Mirror | None:
    """Returns the mirror that a local folder is; None for any other."""
    return _open.get(Path(folder).absolute())


def share(folder: Path | str, files: Iterable[Path]) -> None:
    """Sends files of a mirror that the first process takes from here; nothing for any other folder."""
    mirror = mirror_of(folder)
    for path in files if mirror else ():
        if mirror and path.exists():
            mirror.bucket.write(f"{_PASSED}/{path.name}", path.read_bytes())


def take(folder: Path | str, files: Iterable[Path]) -> None:
    """Puts into a mirror what other processes `share`, after all have; nothing for any other folder."""
    mirror = mirror_of(folder)
    for path in files if mirror else ():
        if mirror and (data := mirror.bucket.read(f"{_PASSED}/{path.name}")) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            mirror.bucket.remove([f"{_PASSED}/{path.name}"])


@contextlib.contextmanager
def opened(folder: Path | str, cache: Path, *, send: bool = True) -> Iterator[Path]:
    """Yields a local folder to work in; one of an object store is copied first, and what changed goes back at the end.

    Args:
      folder: local, which is yielded as it is, or of an object store.
      cache: folder for the copies.
      send: whether this process is the one that sends files back; of several, the first.
    """
    if not is_remote(folder):
        yield Path(folder)
        return
    mirror = _mirror(str(folder), cache, lambda name: name.partition("/")[0] not in _EXPORTS)
    try:
        yield mirror.folder
    finally:
        try:
            if send:
                mirror.push()
        finally:
            _open.pop(mirror.folder, None)


@functools.lru_cache(64)
def reading(folder: Path | str, cache: Path | None = None) -> Path:
    """Returns a local folder from which another run, or a folder of weights, is read.

    Of a run's folder in an object store the small files are copied, once a process; its checkpoints are read from the
    store as they are needed. Any other folder there is copied whole.

    Args:
      folder: local, which is returned as it is, or of an object store.
      cache: folder for the copies; the user's when None.

    Raises:
      InputError: nothing there, or a folder of a run that was not sent whole.
    """
    if not is_remote(folder):
        return Path(folder)
    cache = remote.cache_folder() if cache is None else cache
    url = str(folder).rstrip("/")
    bucket = Bucket(url)
    if is_run(bucket):
        return _mirror(url, cache, lambda name: name.partition("/")[0] not in _EXPORTS).folder
    parent, _, own = url.rpartition("/")
    if not parent.endswith(":/") and (listed := read_listing(Bucket(parent))):
        if not any(name.startswith(f"{own}/") for name in listed):
            raise InputError(f"{url}: is not whole there: it was being sent, or was never made")
        return _mirror(parent, cache, lambda name: name.startswith(f"{own}/")).folder / own
    return remote.local(url, cache)


def located(name: str) -> str:
    """Returns a name that may be a folder, see `reading`, or a hub id, which stays as it is."""
    return str(reading(name)) if is_remote(name) else name


def is_run(bucket: Bucket) -> bool:
    """Whether a folder of an object store is a run's."""
    return bucket.read(LISTING) is not None or bool(bucket.sizes("checkpoints"))


def _mirror(url: str, cache: Path, wanted: Callable[[str], bool]) -> Mirror:
    bucket = Bucket(url)
    mirror = Mirror(bucket, _place(bucket.url, cache).absolute())
    mirror.pull(wanted)
    _open[mirror.folder] = mirror
    return mirror


def _place(url: str, cache: Path) -> Path:
    """Returns an empty folder that no other process on this machine has; those of ended processes are used again."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{_HOST}"
    base = cache / "runs"
    try:
        base.mkdir(parents=True, exist_ok=True)
        for number in range(1 << 16):
            handle: Any = os.open(base / f"{name}-{number}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                continue
            _held.append(handle)  # until this process ends
            folder = base / f"{name}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            folder = folder / url.rpartition("/")[2]
            folder.mkdir(parents=True)
            return folder
    except OSError as error:
        raise InputError(f"{base}: cannot be written: {error.strerror}; data.cache names another folder") from error
    raise InputError(f"{base}: no free folder for {url}")
