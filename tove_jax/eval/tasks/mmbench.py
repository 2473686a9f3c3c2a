"""MMBench (Liu et al., arXiv:2307.06281): choices with letters, each question asked with its choices rotated."""

from __future__ import annotations

import base64
import binascii
import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tove_jax.data.decode import decode
from tove_jax.data.picture import Picture
from tove_jax.data.vqa import LETTER
from tove_jax.errors import InputError
from tove_jax.eval.tasks.base import LETTERS, Question, Scores, by_group, check_answers, group_by
from tove_jax.eval.tasks.letters import inferred_letter

ROTATION = 1_000_000
"""Published files number the rotations of question n as n + 1,000,000, n + 2,000,000 and so on."""
_LONGEST = 2**26
_REFERENCE = 64
_NOTHING = ("", "nan", "none")


class TablePictures:
    """The pictures of a TSV file's ``image`` column, base64, read from the file when they are asked for.

    Args:
      path: of the file.
      places: byte offset and length of each picture's text.
      ids: of the pictures.
    """

    name = "mmbench"
    licence = "unknown"

    def __init__(self, path: Path, places: Sequence[tuple[int, int]], ids: Sequence[str]):
        self._path, self._places = path, places
        self.ids = list(ids)
        self.labels: list[str | None] = [None] * len(self.ids)
        self.captions: list[str | None] = [None] * len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Picture:
        """Decodes one picture; raises InputError when it is damaged."""
        start, length = self._places[index]
        where = f"{self._path}, image of question {self.ids[index]}"
        with open(self._path, "rb") as stream:
            stream.seek(start)
            text = stream.read(length)
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"{where}: expected base64, cannot read it: {error}") from error
        return Picture(self.ids[index], decode(data, where))


@dataclasses.dataclass(frozen=True)
class _Row:
    index: int
    fields: dict[str, str]
    image: tuple[int, int]


def _rows(path: Path) -> Iterator[_Row]:
    """Yields the rows with the place of their picture's text in the file; the texts themselves are not kept."""
    try:
        with open(path, "rb") as stream:
            header: list[str] | None = None
            record, start = b"", 0
            for raw in stream:
                record += raw
                # A line end inside quotes belongs to the field.
                if record.count(b'"') % 2:
                    continue
                line, begin = record, start
                start, record = start + len(record), b""
                if not line.strip():
                    continue
                fields = next(csv.reader([line.decode("utf-8-sig")], delimiter="\t"))
                if header is None:
                    header = [name.strip() for name in fields]
                    lacking = [name for name in ("index", "question", "image", "A", "B") if name not in header]
                    if lacking:
                        raise InputError(f"{path}: expected a column {lacking[0]!r}, found {', '.join(header)}")
                    continue
                if len(fields) != len(header):
                    raise InputError(f"{path}, row at byte {begin}: expected {len(header)} fields, found {len(fields)}")
                found = dict(zip(header, fields, strict=True))
                image = found.pop("image")
                if not found["index"].isdigit():
                    raise InputError(f"{path}, row at byte {begin}: field index: found {found['index']!r:.40}")
                found["image"] = image if len(image) < _REFERENCE else ""
                offset = line.index(image.encode()) if image else 0
                yield _Row(int(found["index"]), found, (begin + offset, len(image)))
            if record:
                raise InputError(f"{path}: a quoted field is not closed, from byte {start} on")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def read(path: Path | str, *, rotate: bool = True) -> tuple[TablePictures, list[Question]]:
    """Reads a published TSV file: ``index question hint A B C D answer category image``, tabs between.

    A short ``image`` is the index of the row that holds the picture. Where the file has no rotated rows they are
    made, each with the choices shifted one further to the left.

    Args:
      path: of the file.
      rotate: make rotations; False: each question is asked as it stands.

    Raises:
      InputError: a missing column, a row of another length, no choices, an answer that is no letter of them,
        a picture that is referred to and missing.
    """
    path, limit = Path(path).expanduser(), csv.field_size_limit(_LONGEST)
    try:
        rows = list(_rows(path))
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise InputError(f"{path}: expected questions, found none")
    own = {row.index: number for number, row in enumerate(rows) if row.image[1] >= _REFERENCE}
    order = list(own)
    pictures = TablePictures(path, [rows[own[index]].image for index in order], [str(index) for index in order])
    place = {index: number for number, index in enumerate(order)}
    rotated = any(row.index >= ROTATION for row in rows)
    questions: list[Question] = []
    seen: set[int] = set()
    for row in rows:
        where = f"{path}, question {row.index}"
        if row.index in seen:
            raise InputError(f"{where}: expected each index once, found it again")
        seen.add(row.index)
        told = row.fields["image"]
        holder = int(told) if told.isdigit() else row.index
        if holder not in place:
            raise InputError(f"{where}: field image: expected a picture or the index of one, found {told!r:.40}")
        questions += _questions(row, place[holder], where, rotate and not rotated)
    return pictures, questions


def _questions(row: _Row, picture: int, where: str, rotate: bool) -> Iterator[Question]:
    fields = row.fields
    choices: list[str] = []
    for letter in LETTERS[:8]:
        text = fields.get(letter, "").strip()
        if text.lower() in _NOTHING:
            break
        choices.append(text)
    if len(choices) < 2:
        raise InputError(f"{where}: expected choices in the columns A and B, found {choices}")
    answer = fields.get("answer", "").strip()
    if answer and answer not in LETTERS[: len(choices)]:
        raise InputError(f"{where}: field answer: expected a letter of {len(choices)} choices, found {answer!r:.40}")
    right = LETTERS.index(answer) if answer else -1
    hint = fields.get("hint", "").strip()
    asked = fields["question"] if hint.lower() in _NOTHING else f"{hint}\n{fields['question']}"
    for turn in range(len(choices) if rotate else 1):
        turned = choices[turn:] + choices[:turn]
        lines = [asked, *(f"{letter}. {text}" for letter, text in zip(LETTERS, turned, strict=False)), LETTER]
        yield Question(
            id=str(row.index + turn * ROTATION),
            pictures=(picture,),
            prompt="\n".join(lines),
            answers=(LETTERS[(right - turn) % len(choices)],) if answer else (),
            choices=tuple(turned),
            group=fields.get("category", ""),
            unit=str(row.index % ROTATION),
        )


def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """``accuracy``, circular: a question counts where all its rotations are right; also by category.

    ``accuracy_plain`` is over the questions as published, unrotated; ``unclear`` the share of all answers that name no
    choice. Answers that the published pipeline would give to a judge model are wrong here.
    """
    check_answers(questions, answers)
    letters = [inferred_letter(answer, question.choices) for question, answer in zip(questions, answers, strict=True)]
    right = np.array([one == question.answers[0] for question, one in zip(questions, letters, strict=True)])
    circular = np.full(len(questions), np.nan)
    plain = np.full(len(questions), np.nan)
    for places in group_by(questions, lambda question: question.unit or question.id).values():
        first = next((place for place in places if questions[place].id == questions[place].unit), places[0])
        circular[first] = right[places].all()
        plain[first] = right[first]
    found = by_group("accuracy", circular, questions)
    more = {"accuracy_plain": plain, "unclear": np.array([one is None for one in letters], np.float64)}
    metrics = {name: float(np.nanmean(values)) for name, values in more.items()}
    return Scores({**found.metrics, **metrics}, {**found.each, **more})
