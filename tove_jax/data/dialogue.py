"""Conversations about pictures: what every source of text yields."""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, overload

from tove_jax.data.conversation import IMAGE
from tove_jax.data.picture import PictureSource
from tove_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """One conversation.

    Attributes:
      id: unique in its source, stable between runs and machines.
      pictures: numbers of its pictures in the source, in the order of their ``<image>``; empty: text alone.
      turns: LLaVA's, ``{"from": "human" or "gpt", "value": text}`` in turn.
    """

    id: str
    pictures: tuple[int, ...]
    turns: tuple[dict[str, str], ...]


class DialogueSource(PictureSource, Protocol):
    """Pictures, each once, and the conversations about them; features belong to pictures, not to conversations.

    Attributes:
      dialogues: random access, safe to read from several threads, cheap to pickle with the source.
    """

    dialogues: Sequence[Dialogue]


class StoredDialogues(Sequence[Dialogue]):
    """Conversations kept as text, each made when it is asked for.

    They take about as many bytes as in LLaVA's JSON, a quarter of what they take as Python objects.
    """

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._text = bytearray()
        self._ends = array("q", [0])
        self._pictures = array("i")
        self._counts = array("q", [0])

    def append(self, id: str, pictures: Sequence[int], turns: Sequence[Mapping[str, Any]]) -> None:
        """Adds a conversation; of a turn only ``from`` and ``value`` are kept."""
        said = [part for turn in turns for part in (turn["from"], turn["value"])]
        self._ids.append(id)
        # Escapes keep what UTF-8 has no bytes for, such as half of a surrogate pair.
        self._text += json.dumps(said, separators=(",", ":")).encode()
        self._ends.append(len(self._text))
        self._pictures.extend(pictures)
        self._counts.append(len(self._pictures))

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Dialogue: ...

    @overload
    def __getitem__(self, index: slice) -> list[Dialogue]: ...

    def __getitem__(self, index: int | slice) -> Dialogue | list[Dialogue]:
        """Makes one conversation, or a list of some."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        said = json.loads(self._text[self._ends[index] : self._ends[index + 1]])
        turns = tuple({"from": said[at], "value": said[at + 1]} for at in range(0, len(said), 2))
        return Dialogue(self._ids[index], self.pictures(index), turns)

    def pictures(self, index: int) -> tuple[int, ...]:
        """Returns the pictures of one conversation."""
        return tuple(self._pictures[self._counts[index] : self._counts[index + 1]])


def pictures_of(dialogues: Sequence[Dialogue], number: int) -> tuple[int, ...]:
    """Returns the pictures of a conversation, without making its text where it is stored."""
    if isinstance(dialogues, StoredDialogues):
        return dialogues.pictures(number)
    return dialogues[number].pictures


def caption_dialogues(source: PictureSource) -> list[Dialogue]:
    """Returns one conversation for each picture with a caption, which is the answer to the picture alone."""
    return [
        Dialogue(id, (number,), ({"from": "human", "value": IMAGE}, {"from": "gpt", "value": caption}))
        for number, (id, caption) in enumerate(zip(source.ids, source.captions, strict=True))
        if caption is not None and caption.strip()
    ]


def dialogues_of(source: PictureSource) -> Sequence[Dialogue]:
    """Returns a source's own conversations or, where it has none, those that its captions make.

    Raises:
      InputError: it has neither.
    """
    own = getattr(source, "dialogues", None)
    dialogues = caption_dialogues(source) if own is None else own
    if not len(dialogues):
        raise InputError(
            f"data.source: expected a source with conversations or captions, {source.name!r} has none for its "
            f"{len(source)} pictures"
        )
    return dialogues


def blank_picture(source: PictureSource) -> int | None:
    """Returns the number of the black picture that a source shows for text alone, None where it has none."""
    pictured = getattr(source, "pictured", None)
    return None if pictured is None or all(pictured) else list(pictured).index(False)
