"""Records of published JSON files: read one at a time, and the pictures they name, each once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tove_jax.data.decode import read_picture
from tove_jax.data.picture import BLANK, Picture
from tove_jax.errors import InputError

_CHUNK = 2**22
_SPACE = " \t\r\n"


def _elements(path: Path) -> Iterator[Any]:
    """Yields the elements of a JSON list, holding one and a piece of the file at a time."""
    decoder, text, at, last = json.JSONDecoder(), "", 0, False
    begun = wants = False  # the bracket was read; an element must follow, after a comma
    with open(path, encoding="utf-8-sig") as stream:
        while True:
            while at < len(text) and text[at] in _SPACE:
                at += 1
            mark = text[at : at + 1]
            if not begun and mark:
                if mark != "[":
                    raise InputError(f"{path}: expected a list of records, found {text[at : at + 20]!r}")
                begun, at = True, at + 1
                continue
            if mark == "]" and not wants:
                if (text[at + 1 :] + stream.read()).strip():
                    raise ValueError("text after the list's end")
                return
            try:
                if not mark:
                    raise ValueError("the file ends within the list")
                value, end = decoder.raw_decode(text, at)
                # A number at the end of a piece may go on in the next one.
                if end == len(text) and not last:
                    raise ValueError("the file ends within the list")
            except ValueError:
                if last:
                    raise
                more = stream.read(max(_CHUNK, len(text) - at))
                text, at, last = text[at:] + more, 0, not more
                continue
            yield value
            while True:
                while end < len(text) and text[end] in _SPACE:
                    end += 1
                if end < len(text):
                    break
                text, end = stream.read(_CHUNK), 0
                if not text:
                    raise ValueError("the file ends within the list")
            if text[end : end + 1] not in (",", "]"):
                raise ValueError(f"expected a comma or the list's end, found {text[end : end + 20]!r}")
            wants = text[end] == ","
            at = end + wants


def read_records(path: Path | str) -> Iterator[Any]:
    """Yields the records of a JSON list or, with the ending ``.jsonl``, of JSON lines, one at a time.

    Raises:
      InputError: the file cannot be read, is no JSON or no list, or has no records.
    """
    path = Path(path).expanduser()
    count = 0
    try:
        if path.suffix == ".jsonl":
            with open(path, encoding="utf-8-sig") as stream:
                for line in stream:
                    if line.strip():
                        count += 1
                        yield json.loads(line)
        else:
            for record in _elements(path):
                count += 1
                yield record
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, after {count} records: {error}") from error
    if not count:
        raise InputError(f"{path}: expected a list of records, found none")


def read_object(path: Path | str, *fields: str) -> dict[str, Any]:
    """Reads a JSON object that must have some fields.

    Raises:
      InputError: the file cannot be read, is no JSON object, or lacks a field.
    """
    path = Path(path).expanduser()
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    missing = [field for field in fields if field not in value]
    if missing:
        raise InputError(f"{path}: expected the fields {', '.join(fields)}, found {', '.join(list(value)[:8])}")
    return value


def checked_name(value: Any, where: str) -> str:
    """Returns a picture's path relative to its folder; raises InputError for one that leaves it."""
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: field image: expected a relative path, found {value!r:.40}")
    name = PurePosixPath(value)
    if name.is_absolute() or ".." in name.parts or not name.name:
        raise InputError(f"{where}: field image: expected a path inside the picture folder, found {value!r}")
    return str(name)


class NamedPictures:
    """Pictures of a folder that published records name, each once, in the order they are first named.

    A picture's id is its path relative to the folder, with forward slashes. A black one, `BLANK`, comes last
    where records without a picture are to be shown one.

    Args:
      images: the folder.
      blank_size: side of the black picture, pixels; 0: there is none.

    Attributes:
      pictured: False for the black picture alone.
    """

    name = "named"
    licence = "unknown"

    def __init__(self, images: Path | str, *, blank_size: int = 0):
        self._images = Path(images).expanduser()
        self._blank_size = blank_size
        self._number: dict[str, int] = {}
        self.ids: list[str] = []
        self.labels: Sequence[str | None] = []
        self.captions: Sequence[str | None] = []
        self.pictured: list[bool] = []

    def picture(self, name: str) -> int:
        """Returns the number of a picture, a new one when it is first named."""
        number = self._number.setdefault(name, len(self.ids))
        if number == len(self.ids):
            self.ids.append(name)
        return number

    def close_list(self, path: Path, captions: dict[int, str] | None = None, blank: bool = False) -> None:
        """Ends the list of pictures: checks that each is there, and adds the black one when `blank`.

        Args:
          path: file of the records, for the error.
          captions: by number.
          blank: add `BLANK`.

        Raises:
          InputError: a picture is missing.
        """
        self._check_files(path)
        self._number = {}
        self.pictured = [True] * len(self.ids)
        if blank:
            if BLANK in self.ids:
                raise InputError(f"{path}: the picture {BLANK!r} has the name of the black one")
            self.ids.append(BLANK)
            self.pictured.append(False)
        self.labels = [None] * len(self.ids)
        self.captions = [(captions or {}).get(number) for number in range(len(self.ids))]

    def _check_files(self, path: Path) -> None:
        # A listing a folder, not a look-up a picture: half a million of those are slow on a network disk.
        listed: dict[str, set[str]] = {}
        missing = []
        for name in self.ids:
            folder, file = os.path.split(name)
            if folder not in listed:
                try:
                    listed[folder] = set(os.listdir(self._images / folder))
                except OSError:
                    listed[folder] = set()
            if file not in listed[folder]:
                missing.append(name)
        if missing:
            raise InputError(
                f"{path}: picture {self._images / missing[0]} is missing ({len(missing)} missing of {len(self.ids)})"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Picture:
        """Reads and decodes one picture; raises InputError when it is damaged."""
        if self.pictured[index]:
            image = read_picture(self._images / self.ids[index])
        else:
            image = np.zeros((self._blank_size, self._blank_size, 3), np.uint8)
        return Picture(id=self.ids[index], image=image, caption=self.captions[index], label=self.labels[index])
