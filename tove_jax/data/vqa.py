"""Questions about pictures, from the files that their authors publish: one table of formats.

The same readers serve training (`VqaSource`) and evaluation. A new set is a short function that yields
`VqaRecord` and a row in `SETS`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tove_jax.data.conversation import IMAGE
from tove_jax.data.dialogue import StoredDialogues
from tove_jax.data.records import NamedPictures, checked_name, read_object
from tove_jax.data.records import read_records as read_json
from tove_jax.errors import InputError, nearest

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""LLaVA-1.5's request for a short answer (arXiv 2310.03744, section 3.2)."""
LETTER = "Answer with the option's letter from the given choices directly."
"""LLaVA-1.5's request for a letter."""
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
"""What LLaVA-1.5 puts before the request of VizWiz."""


@dataclasses.dataclass(frozen=True)
class VqaRecord:
    """One question as published.

    Attributes:
      id: unique in its file.
      picture: file name relative to the set's picture folder, None for text alone.
      question: without any request for the form of the answer.
      answers: all given answers, as written; empty where the file keeps them secret.
      choices: of which one is the answer; empty for an open question.
      group: kind of question, for scores by group, or "".
    """

    id: str
    picture: str | None
    question: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    group: str = ""


Reader = Callable[[Path, "Path | None", frozenset[str]], Iterable[VqaRecord]]
"""(file, file of answers or None, parts of it that are wanted or none for all) -> records."""


@dataclasses.dataclass(frozen=True)
class VqaSet:
    """A published format.

    Attributes:
      reader: of its files.
      request: put below the question, on lines of its own.
      lettered: the choices are shown with letters, and a letter is the answer.
    """

    reader: Reader
    request: str = SHORT_ANSWER
    lettered: bool = False


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: field {field}: expected text, found {value!r:.40}")
    return value.strip()


def _listed(value: Any, path: Path, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise InputError(f"{path}: field {field}: expected a list of objects, found {type(value).__name__}")
    return value


def _answers(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Returns ten people's answers, given as texts or as objects with ``answer``."""
    given = record.get("answers")
    if given is None:
        return ()
    found: list[Any] = given if isinstance(given, list) else []
    found = [one.get("answer") if isinstance(one, dict) else one for one in found]
    if not found or not all(isinstance(answer, str) for answer in found):
        raise InputError(f"{where}: field answers: expected a list of texts, found {given!r:.60}")
    return tuple(found)


def coco_name(folder: str, number: Any, where: str) -> str:
    """Returns COCO's file name of a picture, ``COCO_val2014_000000000042.jpg``; since 2017 the number alone."""
    if isinstance(number, str) and number.isdigit():
        number = int(number)
    if not isinstance(number, int):
        raise InputError(f"{where}: field image_id: expected a number, found {number!r:.40}")
    prefix = "" if folder.endswith("2017") else f"COCO_{folder}_"
    return f"{prefix}{number:012d}.jpg"


def _vqav2(path: Path, annotations: Path | None, parts: frozenset[str]) -> Iterator[VqaRecord]:
    file = read_object(path, "questions", "data_subtype")
    folder = str(file["data_subtype"]).replace("test-dev", "test")
    told: dict[Any, dict[str, Any]] = {}
    if annotations is not None:
        found = read_object(annotations, "annotations")["annotations"]
        told = {one.get("question_id"): one for one in _listed(found, annotations, "annotations")}
    for record in _listed(file["questions"], path, "questions"):
        where = f"{path}, question {record.get('question_id')}"
        said = told.get(record.get("question_id"), {})
        if told and not said:
            raise InputError(f"{where}: expected its answers in {annotations}, found none")
        yield VqaRecord(
            id=str(record.get("question_id")),
            picture=coco_name(folder, record.get("image_id"), where),
            question=_text(record, "question", where),
            answers=_answers(said, where),
            group=str(said.get("answer_type", "")),
        )


def _gqa(path: Path, annotations: Path | None, parts: frozenset[str]) -> Iterator[VqaRecord]:
    for id, record in read_object(path).items():
        where = f"{path}, question {id}"
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object, found {type(record).__name__}")
        types = record.get("types") or {}
        yield VqaRecord(
            id=id,
            picture=f"{_text(record, 'imageId', where)}.jpg",
            question=_text(record, "question", where),
            answers=(_text(record, "answer", where),) if "answer" in record else (),
            group=str(types.get("structural", "")),
        )


def _textvqa(path: Path, annotations: Path | None, parts: frozenset[str]) -> Iterator[VqaRecord]:
    for record in _listed(read_object(path, "data")["data"], path, "data"):
        where = f"{path}, question {record.get('question_id')}"
        yield VqaRecord(
            id=str(record.get("question_id")),
            picture=f"{_text(record, 'image_id', where)}.jpg",
            question=_text(record, "question", where),
            answers=_answers(record, where),
        )


def _vizwiz(path: Path, annotations: Path | None, parts: frozenset[str]) -> Iterator[VqaRecord]:
    for number, record in enumerate(read_json(path)):
        where = f"{path}, record {number}"
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object, found {type(record).__name__}")
        picture = _text(record, "image", where)
        yield VqaRecord(
            id=picture.rpartition(".")[0] or picture,
            picture=picture,
            question=_text(record, "question", where),
            answers=_answers(record, where),
            group=str(record.get("answer_type", "")),
        )


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of JSON lines, whatever the file is called, each with its place."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise InputError(f"{path}, line {number}: expected an object, found {line.strip():.40}")
                    yield f"{path}, line {number}", record
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected JSON lines: {error}") from error


def _pope(path: Path, annotations: Path | None, parts: frozenset[str]) -> Iterator[VqaRecord]:
    files = sorted(path.glob("*_pope_*.json")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: expected POPE's files, such as coco_pope_random.json, found none")
    for file in files:
        group = file.stem.rpartition("_")[2]
        if parts and group not in parts:
            continue
        for where, record in _lines(file):
            answer = _text(record, "label", where).lower()
            if answer not in ("yes", "no"):
                raise InputError(f"{where}: field label: expected yes or no, found {answer!r}")
            yield VqaRecord(
                id=f"{group}:{record.get('question_id')}",
                picture=_text(record, "image", where),
                question=_text(record, "text", where),
                answers=(answer,),
                choices=("yes", "no"),
                group=group,
            )


def _vsr(path: Path, annotations: Path | None, parts: frozenset[str]) -> Iterator[VqaRecord]:
    for number, (where, record) in enumerate(_lines(path)):
        if record.get("label") not in (0, 1):
            raise InputError(f"{where}: field label: expected 0 or 1, found {record.get('label')!r}")
        yield VqaRecord(
            id=str(number),
            picture=_text(record, "image", where),
            question=f"{_text(record, 'caption', where)} Is this true of the picture?",
            answers=("yes" if record["label"] else "no",),
            choices=("yes", "no"),
            group=str(record.get("relation", "")),
        )


def _scienceqa(path: Path, annotations: Path | None, parts: frozenset[str]) -> Iterator[VqaRecord]:
    problems = read_object(path)
    if annotations is not None:
        splits = read_object(annotations)
        unknown = sorted(parts - set(splits))
        if unknown:
            raise InputError(f"{annotations}: expected the splits {', '.join(splits)}, found {unknown[0]!r}")
        chosen = [str(id) for part in splits if part in parts or not parts for id in splits[part]]
        wanted: Iterable[str] = dict.fromkeys(chosen)
    else:
        wanted = [id for id, problem in problems.items() if not parts or problem.get("split") in parts]
    for id in wanted:
        where, problem = f"{path}, problem {id}", problems.get(id)
        if not isinstance(problem, dict):
            raise InputError(f"{where}: expected an object, found {problem!r:.40}")
        choices, answer = problem.get("choices"), problem.get("answer")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices) or len(choices) < 2:
            raise InputError(f"{where}: field choices: expected two texts or more, found {choices!r:.60}")
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise InputError(f"{where}: field answer: expected a number below {len(choices)}, found {answer!r}")
        hint = str(problem.get("hint") or "").strip()
        image = problem.get("image")
        yield VqaRecord(
            id=id,
            picture=f"{problem.get('split')}/{id}/{image}" if image else None,
            question=(f"Context: {hint}\n" if hint else "") + _text(problem, "question", where),
            answers=(choices[answer],),
            choices=tuple(choices),
            group=str(problem.get("subject", "")),
        )


SETS: Mapping[str, VqaSet] = {
    "vqav2": VqaSet(_vqav2),
    "gqa": VqaSet(_gqa),
    "textvqa": VqaSet(_textvqa),
    "vizwiz": VqaSet(_vizwiz, f"{UNANSWERABLE}\n{SHORT_ANSWER}"),
    "pope": VqaSet(_pope),
    "vsr": VqaSet(_vsr),
    "scienceqa": VqaSet(_scienceqa, LETTER, lettered=True),
}
"""By kind. `docs/data.md` says which files of each set are read."""


def get_set(kind: str) -> VqaSet:
    """Returns a format by name; raises InputError with the nearest name."""
    if kind not in SETS:
        raise InputError(f"questions: expected one of {', '.join(SETS)}, found {kind!r}{nearest(kind, SETS)}")
    return SETS[kind]


def split_parts(path: Path | str) -> tuple[Path, frozenset[str]]:
    """Divides ``file#part+part`` into the file and the parts of it that are wanted, none for all."""
    name, mark, parts = str(path).rpartition("#")
    if not mark:
        return Path(path).expanduser(), frozenset()
    return Path(name).expanduser(), frozenset(part for part in parts.split("+") if part)


def read_records(kind: str, path: Path | str, *, annotations: Path | str | None = None) -> list[VqaRecord]:
    """Reads the questions of a published set.

    Args:
      kind: see `SETS`.
      path: file of the questions (of POPE also the folder of its three); ``file#test`` or ``file#train+val``
        reads some parts of a file that holds several (ScienceQA's splits, POPE's three kinds).
      annotations: file of the answers where they are apart: VQAv2's annotations, ScienceQA's ``pid_splits.json``.

    Raises:
      InputError: naming file, record and field: missing, not of this format; an id twice; no question.
    """
    file, parts = split_parts(path)
    known = get_set(kind)
    answers = Path(annotations).expanduser() if annotations else None
    records = []
    seen: set[str] = set()
    for record in known.reader(file, answers, parts):
        where = f"{file}, question {record.id}"
        if record.picture is not None:
            checked_name(record.picture, where)
        if record.id in seen:
            raise InputError(f"{where}: expected each id once, found it again")
        seen.add(record.id)
        records.append(record)
    if not records:
        some = f" in {', '.join(sorted(parts))}" if parts else ""
        raise InputError(f"{file}: expected questions of {kind}{some}, found none")
    return records


def prompt_of(kind: str, record: VqaRecord, *, request: bool = True) -> str:
    """Returns what is asked: the question, its choices with letters where the set has them, the request for a form.

    Args:
      kind: see `SETS`.
      record: of that set.
      request: add LLaVA-1.5's request for the form of the answer.
    """
    known = get_set(kind)
    lines = [record.question]
    if known.lettered:
        lines += [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, record.choices, strict=False)]
    if request and known.request:
        lines.append(known.request)
    return "\n".join(lines)


def answer_of(kind: str, record: VqaRecord) -> str:
    """Returns the answer to learn: the commonest one, the first of equally common ones; a letter for lettered sets.

    Raises:
      InputError: the record has none.
    """
    counts = collections.Counter(answer for answer in record.answers if answer.strip())
    if not counts:
        raise InputError(f"{kind}: question {record.id!r}: expected an answer to learn, found none")
    answer = counts.most_common(1)[0][0]
    return string.ascii_uppercase[record.choices.index(answer)] if get_set(kind).lettered else answer


class VqaSource(NamedPictures):
    """A published set of questions as conversations of one round: question and commonest answer.

    Args:
      kind: see `SETS`.
      path, annotations: as `read_records` takes them.
      images: folder of the pictures.
      blank_size: side of the black picture that comes last when some questions have no picture, pixels.

    Attributes:
      dialogues: one a question, its id the question's.
      pictured: False for the black picture alone.

    Raises:
      InputError: as `read_records`; a question without an answer; a missing picture file.
    """

    def __init__(
        self, kind: str, path: Path | str, images: Path | str, annotations: Path | str = "", *, blank_size: int = 224
    ):
        super().__init__(images, blank_size=blank_size)
        self.name = kind
        self._opened = (kind, str(path), str(images), str(annotations), blank_size)
        self.dialogues = StoredDialogues()
        blank = False
        for record in read_records(kind, path, annotations=annotations or None):
            pictures = [] if record.picture is None else [self.picture(record.picture)]
            prompt = prompt_of(kind, record)
            self.dialogues.append(
                record.id,
                pictures,
                (
                    {"from": "human", "value": f"{IMAGE}\n{prompt}" if pictures else prompt},
                    {"from": "gpt", "value": answer_of(kind, record)},
                ),
            )
            blank = blank or not pictures
        self.close_list(split_parts(path)[0], blank=blank)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_vqa, self._opened


def _open_vqa(kind: str, path: str, images: str, annotations: str, blank_size: int) -> VqaSource:
    return VqaSource(kind, path, images, annotations, blank_size=blank_size)
