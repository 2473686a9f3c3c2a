"""LLaVA's JSON: a list of records with an image and a conversation, beside a folder of pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tove_jax.data.decode import read_picture
from tove_jax.data.picture import Picture
from tove_jax.errors import InputError


def _read_records(path: Path) -> list[Any]:
    try:
        if path.suffix == ".jsonl":
            lines = path.read_text("utf-8").splitlines()
            return [json.loads(line) for line in lines if line.strip()]
        records = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"data.path: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: expected a list of records, found {type(records).__name__} with none")
    return records


def _image_of(record: dict[str, Any], where: str) -> str | None:
    image = record.get("image")
    if isinstance(image, list):
        if len(image) > 1:
            raise InputError(f"{where}: expected one picture a record, found {len(image)}")
        image = image[0] if image else None
    if image is None or image == "":
        return None
    if not isinstance(image, str):
        raise InputError(f"{where}: field image: expected a relative path, found {type(image).__name__}")
    name = PurePosixPath(image)
    if name.is_absolute() or ".." in name.parts:
        raise InputError(f"{where}: field image: expected a path inside the picture folder, found {image!r}")
    return str(name)


def _turns_of(record: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: field conversations: expected a list of turns, found {turns!r:.40}")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise InputError(f"{where}: turn {number}: expected an object with from and value, found {turn!r:.60}")
        if not isinstance(turn.get("value"), str) or not turn["value"].strip():
            raise InputError(f"{where}: turn {number} of {turn['from']!r}: expected text in value, found none")
    return tuple(turns)


class LlavaSource:
    """Records of a LLaVA-style JSON (or JSON lines) with the pictures they name.

    A record's id is its ``id``. Published mixtures hold an id several times, for several conversations
    about one picture: from the second on they get ``#2``, ``#3`` and so on; an id that comes again
    with another picture is an error. The caption is the answer of a record of two turns, else None. A
    record without a picture, text only, has a black one, and False in `pictured`.

    Args:
      path: of the JSON.
      images: folder that the records' ``image`` fields are relative to.
      blank_size: side of the black picture, pixels.

    Attributes:
      pictured: whether each record has a picture, list of bool.

    Raises:
      InputError: naming the record: no id, no conversation, an empty turn, a missing picture file,
        a path that leaves the folder, an id with two pictures.
    """

    name = "llava"
    licence = "unknown"

    def __init__(self, path: Path | str, images: Path | str, *, blank_size: int = 224):
        self._path, self._images = Path(path).expanduser(), Path(images).expanduser()
        self._blank_size = blank_size
        self.ids: list[str] = []
        self.labels: list[str | None] = []
        self.captions: list[str | None] = []
        self.pictured: list[bool] = []
        self._names: list[str | None] = []
        self._turns: list[tuple[dict[str, Any], ...]] = []
        times: dict[str, int] = {}
        picture_of: dict[str, str | None] = {}
        for number, record in enumerate(_read_records(self._path)):
            where = f"{self._path}, record {number}"
            if not isinstance(record, dict) or not isinstance(record.get("id"), str | int):
                raise InputError(f"{where}: expected an object with an id, found {record!r:.60}")
            id = str(record["id"])
            where = f"{where} (id {id!r})"
            name, turns = _image_of(record, where), _turns_of(record, where)
            if picture_of.setdefault(id, name) != name:
                raise InputError(f"{where}: the id was already used for {picture_of[id]!r}, now for {name!r}")
            times[id] = times.get(id, 0) + 1
            plain = len(turns) == 2 and turns[1]["from"] == "gpt"
            self.ids.append(id if times[id] == 1 else f"{id}#{times[id]}")
            self.labels.append(None)
            self.captions.append(turns[1]["value"].strip() if plain else None)
            self.pictured.append(name is not None)
            self._names.append(name)
            self._turns.append(turns)
        if len(set(self.ids)) != len(self.ids):
            raise InputError(f"{self._path}: ids that end in '#' and a number collide with repeated ids")
        self._check_files()

    def _check_files(self) -> None:
        # A listing a folder, not a look-up a picture: half a million of those are slow on a network disk.
        listed: dict[str, set[str]] = {}
        missing = []
        for id, name in zip(self.ids, self._names, strict=True):
            if name is None:
                continue
            folder, file = os.path.split(name)
            if folder not in listed:
                try:
                    listed[folder] = set(os.listdir(self._images / folder))
                except OSError:
                    listed[folder] = set()
            if file not in listed[folder]:
                missing.append((id, name))
        if missing:
            id, name = missing[0]
            raise InputError(
                f"{self._path}: record with id {id!r}: picture {self._images / name} is missing "
                f"({len(missing)} missing of {sum(self.pictured)})"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_llava, (self._path, self._images, self._blank_size)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Picture:
        """Reads and decodes one record's picture; raises InputError when it is damaged."""
        name = self._names[index]
        if name is None:
            image = np.zeros((self._blank_size, self._blank_size, 3), np.uint8)
        else:
            image = read_picture(self._images / name)
        return Picture(
            id=self.ids[index],
            image=image,
            caption=self.captions[index],
            conversations=self._turns[index],
        )


def _open_llava(path: Path, images: Path, blank_size: int) -> LlavaSource:
    return LlavaSource(path, images, blank_size=blank_size)
