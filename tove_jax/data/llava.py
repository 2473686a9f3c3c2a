"""LLaVA's JSON: a list of records with pictures and a conversation, beside a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tove_jax.data.dialogue import StoredDialogues
from tove_jax.data.records import NamedPictures, checked_name, read_records
from tove_jax.errors import InputError


def _images_of(record: dict[str, Any], where: str) -> list[str]:
    images = record.get("image")
    if images is None or images == "":
        return []
    return [checked_name(image, where) for image in (images if isinstance(images, list) else [images])]


def _turns_of(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: field conversations: expected a list of turns, found {turns!r:.40}")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise InputError(f"{where}: turn {number}: expected an object with from and value, found {turn!r:.60}")
        if not isinstance(turn.get("value"), str) or not turn["value"].strip():
            raise InputError(f"{where}: turn {number} of {turn['from']!r}: expected text in value, found none")
    return turns


class LlavaSource(NamedPictures):
    """Records of a LLaVA-style JSON (or JSON lines) and the pictures they name.

    A picture's id is its path as the records write it, whichever and how many of them name it; its caption the
    answer of a record of two turns, when that record is the only one that names it and names no other.
    A conversation's id is its record's ``id``. Published mixtures hold ids several times: from the second on
    they get ``#2``, ``#3`` and so on. Records without a picture are conversations without one, and then the
    black picture `tove_jax.data.picture.BLANK` comes last, for the methods that distil on such rows.

    The records are read one at a time and kept as text, so that a host needs little more memory than the file
    is long.

    Args:
      path: of the JSON.
      images: folder that the records' ``image`` fields are relative to.
      blank_size: side of the black picture, pixels.

    Attributes:
      dialogues: all records, in their order.
      pictured: False for the black picture alone.

    Raises:
      InputError: naming the record: no id, no conversation, an empty turn, a path that leaves the folder; a
        missing picture file.
    """

    name = "llava"

    def __init__(self, path: Path | str, images: Path | str, *, blank_size: int = 224):
        super().__init__(images, blank_size=blank_size)
        self._path = Path(path).expanduser()
        self.dialogues = StoredDialogues()
        times: dict[str, int] = {}
        ids: set[str] = set()
        captions: dict[int, str | None] = {}
        blank = False
        for number, record in enumerate(read_records(self._path)):
            where = f"{self._path}, record {number}"
            if not isinstance(record, dict) or not isinstance(record.get("id"), str | int):
                raise InputError(f"{where}: expected an object with an id, found {record!r:.60}")
            id = str(record["id"])
            where = f"{where} (id {id!r})"
            pictures = [self.picture(name) for name in _images_of(record, where)]
            turns = _turns_of(record, where)
            times[id] = times.get(id, 0) + 1
            id = id if times[id] == 1 else f"{id}#{times[id]}"
            if id in ids:
                raise InputError(f"{where}: the id {id!r} collides with that of a repeated record")
            ids.add(id)
            self.dialogues.append(id, pictures, turns)
            plain = len(pictures) == 1 and len(turns) == 2 and turns[1]["from"] == "gpt"
            for picture in pictures:
                captions[picture] = turns[1]["value"].strip() if plain and picture not in captions else None
            blank = blank or not pictures
        told = {picture: caption for picture, caption in captions.items() if caption is not None}
        self.close_list(self._path, told, blank=blank)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_llava, (self._path, self._images, self._blank_size)


def _open_llava(path: Path, images: Path, blank_size: int) -> LlavaSource:
    return LlavaSource(path, images, blank_size=blank_size)
