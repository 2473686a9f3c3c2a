"""Pictures in tar files, webdataset's way: members of one sample share the name before the first dot."""

from __future__ import annotations

import dataclasses
import glob
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from tove_jax.data.cache import cache_folder, content_key
from tove_jax.data.decode import SUFFIXES, decode
from tove_jax.data.picture import Picture
from tove_jax.errors import InputError
from tove_jax.files.atomic import atomic_write_json

_INDEX_VERSION = 1
_BLOCK = 512


def expand_pattern(pattern: str) -> list[Path]:
    """Expands braces (``{000..012}``, ``{a,b}``) and, where there are ``*?[``, the file system.

    Returns:
      The tar files in the order of the pattern; those of one wildcard sorted by name.

    Raises:
      InputError: nothing matches, or a named file is not there.
    """
    paths: list[Path] = []
    for name in _expand_braces(pattern):
        found = sorted(glob.glob(name)) if any(c in name for c in "*?[") else [name]
        paths.extend(Path(path) for path in found)
    if not paths:
        raise InputError(f"data.path: expected tar files, found none that match {pattern!r}")
    for path in paths:
        if not path.is_file():
            raise InputError(f"data.path: {pattern!r} names {path}, which is not a file")
    return list(dict.fromkeys(paths))


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise InputError(f"data.path: expected an ascending range, found {match[0]!r} in {pattern!r}")
        width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for choice in choices for name in _expand_braces(before + choice + after)]


@dataclasses.dataclass(frozen=True)
class _TarIndex:
    """Columns over the samples of one tar: where each picture lies, and what is said of it."""

    keys: list[str]
    names: list[str]
    offsets: list[int]
    sizes: list[int]
    captions: list[str | None]
    labels: list[str | None]


def _text(path: Path, member: str, data: bytes) -> str:
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: member {member!r}: expected UTF-8 text: {error}") from error


def _metadata(path: Path, member: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InputError(f"{path}: member {member!r}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: member {member!r}: expected a JSON object, found {type(value).__name__}")
    return value


def _members(path: Path) -> Iterable[tuple[tarfile.TarInfo, bytes | None]]:
    """Yields each regular member, with its content when it is short text; then checks the tar's end."""
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    raise InputError(
                        f"{path}: truncated: member {member.name!r} ends at byte "
                        f"{member.offset_data + member.size}, the file at {size}"
                    )
                if member.isfile():
                    text = PurePosixPath(member.name).suffix.lower() in (".txt", ".cls", ".json")
                    yield member, tar.extractfile(member).read() if text else None
            end = tar.offset
        with open(path, "rb") as stream:
            stream.seek(end)
            block = stream.read(_BLOCK)
    except tarfile.TarError as error:
        with open(path, "rb") as stream:
            start = stream.read(4)
        raise InputError(
            f"{path}: expected an uncompressed tar, found {size} bytes that begin with {start!r}: {error}"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if block != bytes(_BLOCK):
        raise InputError(
            f"{path}: truncated or corrupt: expected the tar's closing block of zeros or a member's header "
            f"at byte {end} of {size}"
        )


def _index_tar(path: Path) -> _TarIndex:
    samples: dict[str, dict[str, Any]] = {}
    for member, data in _members(path):
        name = PurePosixPath(member.name)
        if name.name.startswith("."):
            continue
        stem, _, extension = name.name.partition(".")
        key = str(name.with_name(stem))
        extension = extension.lower()
        kind = "picture" if f".{extension}" in SUFFIXES else extension
        sample = samples.setdefault(key, {})
        if kind in sample:
            raise InputError(f"{path}: sample {key!r} has two members of kind {kind!r}: {member.name!r}")
        if kind == "picture":
            sample[kind] = (member.name, member.offset_data, member.size)
        elif kind == "json":
            sample[kind] = _metadata(path, member.name, data or b"")
        elif kind in ("txt", "cls"):
            sample[kind] = _text(path, member.name, data or b"")
    index = _TarIndex([], [], [], [], [], [])
    for key, sample in samples.items():
        if "picture" not in sample:
            if not sample:
                continue  # a file beside the samples, such as a licence
            raise InputError(
                f"{path}: sample {key!r}: expected a picture ({', '.join(SUFFIXES)}), found only "
                f"{', '.join('.' + kind for kind in sample)}"
            )
        name, offset, size = sample["picture"]
        said = sample.get("json", {})
        caption, label = sample.get("txt", said.get("caption")), sample.get("cls", said.get("label"))
        index.keys.append(key)
        index.names.append(name)
        index.offsets.append(offset)
        index.sizes.append(size)
        index.captions.append(None if caption is None else str(caption))
        index.labels.append(None if label is None else str(label))
    return index


def _cached_index(path: Path, cache: Path) -> _TarIndex:
    state = path.stat()
    key = content_key(version=_INDEX_VERSION, path=str(path.resolve()), size=state.st_size, time=state.st_mtime_ns)
    kept = cache / "tar-index" / f"{key}.json"
    fields = [field.name for field in dataclasses.fields(_TarIndex)]
    try:
        columns = json.loads(kept.read_bytes())
        index = _TarIndex(**{name: columns[name] for name in fields})
        if len({len(getattr(index, name)) for name in fields}) == 1:
            return index
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, or damaged: made anew
    index = _index_tar(path)
    atomic_write_json(kept, dataclasses.asdict(index), indent=None)
    return index


class WebDatasetSource:
    """Random access to the pictures of webdataset tars.

    A picture's id is ``<tar name without .tar>/<key>``. ``.txt`` (or ``caption`` in ``.json``) is the
    caption, ``.cls`` (or ``label`` in ``.json``) the label. The tars are read through once; their
    index is kept in the cache under a key of path, size and time of change.

    Args:
      paths: tar files, uncompressed.
      cache: cache folder; None: the user's.
      name, licence: of the source.
      prefix: put the tar's name before the key.

    Raises:
      InputError: truncated, corrupt or compressed tar, no picture, a sample without one, an id twice.
    """

    def __init__(
        self,
        paths: Sequence[Path | str],
        *,
        cache: Path | None = None,
        name: str = "webdataset",
        licence: str = "unknown",
        prefix: bool = True,
    ):
        self.name = name
        self.licence = licence
        self.ids: list[str] = []
        self.labels: list[str | None] = []
        self.captions: list[str | None] = []
        self._places: list[tuple[int, int, int]] = []
        self._paths = [Path(path) for path in paths]
        cache = cache_folder() if cache is None else cache
        owner: dict[str, Path] = {}
        progress = tqdm(self._paths, "index tars", unit="tar", disable=len(self._paths) < 2, leave=False)
        for number, path in enumerate(progress):
            index = _cached_index(path, cache)
            for row, key in enumerate(index.keys):
                id = f"{path.name.removesuffix('.tar')}/{key}" if prefix else key
                if id in owner:
                    raise InputError(f"{path}: id {id!r} was already seen in {owner[id]}")
                owner[id] = path
                self.ids.append(id)
                self._places.append((number, index.offsets[row], index.sizes[row]))
            self.captions.extend(index.captions)
            self.labels.extend(index.labels)
        if not self.ids:
            raise InputError(f"expected pictures in {', '.join(map(str, self._paths[:3]))}, found none")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Picture:
        """Reads and decodes one picture; raises InputError when it is damaged."""
        number, offset, size = self._places[index]
        path, id = self._paths[number], self.ids[index]
        try:
            with open(path, "rb", buffering=0) as stream:
                stream.seek(offset)
                data = stream.read(size)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
        if len(data) != size:
            raise InputError(f"{path}: truncated: picture {id!r} has {len(data)} of {size} bytes")
        return Picture(
            id=id,
            image=decode(data, f"{path}:{id}"),
            caption=self.captions[index],
            label=self.labels[index],
        )
