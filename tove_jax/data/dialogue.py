"""Conversations about pictures: what every source of text yields."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from tove_jax.data.conversation import IMAGE
from tove_jax.data.picture import PictureSource


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


def caption_dialogues(source: PictureSource) -> list[Dialogue]:
    """Returns one conversation for each picture with a caption, which is the answer to the picture alone."""
    return [
        Dialogue(id, (number,), ({"from": "human", "value": IMAGE}, {"from": "gpt", "value": caption}))
        for number, (id, caption) in enumerate(zip(source.ids, source.captions, strict=True))
        if caption is not None and caption.strip()
    ]
