"""COCO's captions, as COCO publishes them or in Karpathy's split; also other sets in either format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tove_jax.data.conversation import IMAGE
from tove_jax.data.dialogue import StoredDialogues
from tove_jax.data.records import NamedPictures, checked_name, read_object
from tove_jax.data.vqa import split_parts
from tove_jax.errors import InputError


def _caption(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: expected a caption, found {value!r:.40}")
    return " ".join(value.split())


def _rows(file: dict[str, Any], field: str, path: Path) -> list[dict[str, Any]]:
    rows = file[field]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: field {field}: expected a list of objects, found {type(rows).__name__}")
    return rows


def _published(file: dict[str, Any], path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields picture, caption's id and caption, the captions in the order of the pictures."""
    told: dict[Any, list[tuple[str, str]]] = {}
    for row in _rows(file, "annotations", path):
        where = f"{path}, annotation {row.get('id')}"
        told.setdefault(row.get("image_id"), []).append((str(row.get("id")), _caption(row.get("caption"), where)))
    for row in _rows(file, "images", path):
        name = checked_name(row.get("file_name"), f"{path}, image {row.get('id')}")
        for id, caption in told.pop(row.get("id"), []):
            yield name, id, caption
    if told:
        raise InputError(f"{path}: image {next(iter(told))!r} has captions, but is not among the images")


def _karpathy(file: dict[str, Any], path: Path, parts: frozenset[str]) -> Iterator[tuple[str, str, str]]:
    rows = _rows(file, "images", path)
    known = {str(row.get("split")) for row in rows}
    if parts - known:
        raise InputError(f"{path}: expected parts among {', '.join(sorted(known))}, found {min(parts - known)!r}")
    for row in rows:
        if parts and row.get("split") not in parts:
            continue
        where = f"{path}, image {row.get('imgid')}"
        name = checked_name("/".join(filter(None, (row.get("filepath"), row.get("filename")))), where)
        for said in row.get("sentences") or ():
            yield name, str(said.get("sentid")), _caption(said.get("raw"), where)


class CocoSource(NamedPictures):
    """Pictures with several captions each: a conversation a caption, every picture once.

    Args:
      path: ``captions_train2017.json`` and its like, or ``dataset_coco.json`` (also ``dataset_flickr30k.json``);
        ``dataset_coco.json#train+restval`` reads some of its splits.
      images: folder of the pictures: of COCO's own files the one with the JPEG files, of Karpathy's the one above.

    Attributes:
      captions: the first of each picture.
      references: all captions of each picture.
      dialogues: one a caption, its id the caption's.

    Raises:
      InputError: another format, an empty caption, a part that is not there, a missing picture file.
    """

    name = "coco"
    licence = "captions CC BY 4.0 (COCO); pictures: Flickr terms of use"

    def __init__(self, path: Path | str, images: Path | str):
        super().__init__(images)
        self._opened = (str(path), str(images))
        self.dialogues = StoredDialogues()
        self.references: list[tuple[str, ...]] = []
        file, parts = split_parts(path)
        content = read_object(file, "images")
        if "annotations" in content and parts:
            raise InputError(f"{file}: expected no parts of COCO's own files, found {', '.join(sorted(parts))}")
        rows = _published(content, file) if "annotations" in content else _karpathy(content, file, parts)
        told: list[list[str]] = []
        for name, id, caption in rows:
            picture = self.picture(name)
            if picture == len(told):
                told.append([])
            told[picture].append(caption)
            self.dialogues.append(
                id, (picture,), ({"from": "human", "value": IMAGE}, {"from": "gpt", "value": caption})
            )
        if not told:
            raise InputError(f"{file}: expected captions, found none")
        self.references = [tuple(captions) for captions in told]
        self.close_list(file, {number: captions[0] for number, captions in enumerate(told)})

    def __reduce__(self) -> tuple[Any, ...]:
        return CocoSource, self._opened
