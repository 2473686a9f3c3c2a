"""A folder of pictures: the first subfolder is the label, captions come from a file beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tove_jax.data.decode import SUFFIXES, read_picture
from tove_jax.data.picture import Picture
from tove_jax.errors import InputError, nearest


def _pictures(folder: Path, relative: PurePosixPath, above: tuple[str, ...]) -> Iterator[str]:
    """Yields the pictures below `folder` by name; links are followed, but not in a circle."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _pictures(folder / entry.name, relative / entry.name, (*above, real))
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            yield str(relative / entry.name)


def read_captions(folder: Path) -> dict[str, str] | None:
    """Reads ``captions.json`` (``{relative path: caption}``) or ``captions.txt`` (path, tab, caption).

    Returns:
      Captions by relative path with forward slashes, or None where there is neither file.

    Raises:
      InputError: both files, another structure, a picture twice.
    """
    as_json, as_text = folder / "captions.json", folder / "captions.txt"
    if as_json.exists() and as_text.exists():
        raise InputError(f"{folder}: expected one of captions.json and captions.txt, found both")
    if as_json.exists():
        try:
            value = json.loads(as_json.read_bytes())
        except ValueError as error:
            raise InputError(f"{as_json}: expected JSON: {error}") from error
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise InputError(f"{as_json}: expected an object of relative path to caption")
        return value
    if as_text.exists():
        captions: dict[str, str] = {}
        try:
            lines = as_text.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{as_text}: expected UTF-8 text: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            path, tab, caption = line.partition("\t")
            if not tab:
                raise InputError(f"{as_text}, line {number}: expected path, tab, caption, found {line[:60]!r}")
            if path in captions:
                raise InputError(f"{as_text}, line {number}: {path!r} was captioned before")
            captions[path] = caption.strip()
        return captions
    return None


class FolderSource:
    """JPEG, PNG, WebP and GIF files anywhere below a folder, in the order of their names.

    A picture's id is its path relative to the folder, its label the first subfolder (None for
    pictures at the top). Names that begin with a dot are left out. With a captions file every picture
    must have a caption.

    Args:
      path: the folder.

    Raises:
      InputError: no folder, no pictures, a picture without a caption or a caption without a picture.
    """

    name = "folder"
    licence = "unknown"

    def __init__(self, path: Path | str):
        self._folder = Path(path).expanduser()
        if not self._folder.is_dir():
            found = "a file" if self._folder.exists() else "nothing"
            raise InputError(f"data.path: expected a folder of pictures, found {found} at {self._folder}")
        self.ids = list(_pictures(self._folder, PurePosixPath(), ()))
        if not self.ids:
            raise InputError(f"{self._folder}: expected pictures ({', '.join(SUFFIXES)}), found none")
        self.labels = [id.partition("/")[0] if "/" in id else None for id in self.ids]
        captions = read_captions(self._folder)
        if captions is not None:
            self._check(captions)
        self.captions = [None if captions is None else captions[id] for id in self.ids]

    def _check(self, captions: dict[str, str]) -> None:
        there = set(self.ids)
        for id in captions:
            if id not in there:
                raise InputError(f"{self._folder}: the caption of {id!r} has no picture{nearest(id, self.ids)}")
        missing = [id for id in self.ids if not captions.get(id, "").strip()]
        if missing:
            raise InputError(
                f"{self._folder}: expected a caption for each picture, found none for {len(missing)} of "
                f"{len(self.ids)}, among them {missing[0]!r}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Picture:
        """Reads and decodes one picture; raises InputError when it is damaged."""
        id = self.ids[index]
        return Picture(
            id=id,
            image=read_picture(self._folder / id),
            caption=self.captions[index],
            label=self.labels[index],
        )
