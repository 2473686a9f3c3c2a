"""The known tasks: which files each reads, what it asks, how it is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tove_jax.data.folder import FolderSource
from tove_jax.data.records import NamedPictures
from tove_jax.data.vqa import SETS, prompt_of, read_records, split_parts
from tove_jax.errors import InputError, nearest
from tove_jax.eval.metrics_file import FEATURES
from tove_jax.eval.tasks import captions, held_out, letters, mmbench, mme, vqa, yes_no
from tove_jax.eval.tasks.base import Mode, Question, Scorer, Task


@dataclasses.dataclass(frozen=True)
class Options:
    """How a task is asked.

    Attributes:
      prompts: ``llava``: LLaVA-1.5's request below each question; ``plain``: the question as published, no request;
        otherwise a text with ``{question}``, which the question as published stands for.
      choose: answer by the likeliest choice in place of writing; for tasks with choices or `candidates`.
      candidates: file with an answer a line that open questions choose among; with it, `choose` holds.
      mean: rank by log-likelihood per token.
      class_text: text of a class, see `captions.class_questions`.
      rotate: MMBench's circular questions, made where the file has none.
      new_tokens: of an answer at most; 0: the task's own.
    """

    prompts: str = "llava"
    choose: bool = False
    candidates: str = ""
    mean: bool = False
    class_text: str = captions.CLASS_TEXT
    rotate: bool = True
    new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.prompts not in ("llava", "plain") and "{question}" not in self.prompts:
            raise InputError(f"prompts: expected llava, plain or a text with {{question}}, found {self.prompts!r}")


@dataclasses.dataclass(frozen=True)
class Files:
    """What a task is read from.

    Attributes:
      path: questions, or the folder or table that holds everything.
      images: folder of the pictures; None: where the questions are.
      annotations: answers, where they are apart.
    """

    path: Path
    images: Path | None = None
    annotations: Path | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family's row.

    Attributes:
      read: files and options -> (source, questions).
      score: the scorer.
      files: what ``PATH`` parts mean, for messages.
      main: the metric that stands for the task.
      mode: how it is answered unless options say otherwise.
      new_tokens: of an answer at most; LLaVA's evaluation allows 128, and 1024 for MMBench.
      lettered, restrict: see `Task`.
    """

    read: Callable[[Files, Options], tuple[Any, list[Question]]]
    score: Scorer
    files: str = "QUESTIONS[:PICTURES[:ANSWERS]]"
    main: str = "accuracy"
    mode: Mode = "write"
    new_tokens: int = 128
    lettered: bool = False
    restrict: Callable[[Sequence[Question]], list[Question]] | None = None


def asked(question: str, request: str, prompts: str) -> str:
    """Returns a prompt.

    Args:
      question: as published, with its choices.
      request: LLaVA-1.5's for the form of the answer, or "".
      prompts: see `Options`.
    """
    if prompts == "llava":
        return "\n".join(part for part in (question, request) if part)
    return question if prompts == "plain" else prompts.replace("{question}", question)


def _published(kind: str) -> Callable[[Files, Options], tuple[Any, list[Question]]]:
    def read(files: Files, options: Options) -> tuple[Any, list[Question]]:
        file, questions = split_parts(files.path)[0], []
        pictures = NamedPictures(files.images or (file if file.is_dir() else file.parent))
        for record in read_records(kind, files.path, annotations=files.annotations):
            shown = () if record.picture is None else (pictures.picture(record.picture),)
            prompt = asked(prompt_of(kind, record, request=False), SETS[kind].request, options.prompts)
            questions.append(Question(record.id, shown, prompt, record.answers, record.choices, record.group))
        pictures.close_list(file)
        return pictures, questions

    return read


def _mme(files: Files, options: Options) -> tuple[Any, list[Question]]:
    pictures, questions = mme.read(files.path, own_request=options.prompts != "llava")
    return pictures, [_reworded(question, mme.SHORT_ANSWER, options) for question in questions]


def _mmbench(files: Files, options: Options) -> tuple[Any, list[Question]]:
    pictures, questions = mmbench.read(files.path, rotate=options.rotate)
    return pictures, [_reworded(question, mmbench.LETTER, options) for question in questions]


def _reworded(question: Question, request: str, options: Options) -> Question:
    bare = question.prompt.removesuffix(f"\n{request}")
    return dataclasses.replace(question, prompt=asked(bare, request, options.prompts))


def _caption(files: Files, options: Options) -> tuple[Any, list[Question]]:
    source, references = captions.open_captions(files.path, files.images)
    return source, captions.caption_questions(source, references, asked("", captions.REQUEST, options.prompts))


def _retrieval(files: Files, options: Options) -> tuple[Any, list[Question]]:
    source, references = captions.open_captions(files.path, files.images)
    return source, captions.retrieval_questions(source, references, asked("", captions.REQUEST, options.prompts))


def _classes(files: Files, options: Options) -> tuple[Any, list[Question]]:
    source: Any = FolderSource(files.path)
    prompt = asked("", captions.REQUEST, options.prompts)
    return source, captions.class_questions(source, prompt, options.class_text)


def _held_out(files: Files, options: Options) -> tuple[Any, list[Question]]:
    source, found = held_out.read(files.path)
    return source, [dataclasses.replace(one, prompt=asked(one.prompt, "", options.prompts)) for one in found]


_ONE_PATH = "PATH"
KINDS: Mapping[str, Kind] = {
    "vqav2": Kind(_published("vqav2"), vqa.score_vqav2),
    "gqa": Kind(_published("gqa"), vqa.score_gqa),
    "textvqa": Kind(_published("textvqa"), vqa.score_challenge),
    "vizwiz": Kind(_published("vizwiz"), vqa.score_challenge),
    "pope": Kind(_published("pope"), yes_no.score_pope, main="f1_mean"),
    "vsr": Kind(_published("vsr"), yes_no.score_vsr),
    "scienceqa": Kind(_published("scienceqa"), letters.score_scienceqa, lettered=True),
    "mme": Kind(_mme, mme.score, _ONE_PATH, main="points/perception"),
    "mmbench": Kind(_mmbench, mmbench.score, _ONE_PATH, lettered=True),
    "caption": Kind(_caption, captions.score_captions, "CAPTIONS[:PICTURES]", main="cider"),
    "retrieval": Kind(
        _retrieval,
        captions.score_retrieval,
        "CAPTIONS[:PICTURES]",
        main="text_debiased/recall@1",
        mode="rank",
        restrict=captions.among_themselves,
    ),
    "held_out": Kind(_held_out, vqa.score_exact, "RUN", new_tokens=32),
    "zeroshot": Kind(_classes, captions.score_classes, _ONE_PATH, mode="rank"),
}
"""By name; `docs/evaluation.md` says which files each reads."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A task as asked for.

    Attributes:
      kind: see `KINDS`.
      name: how results are filed; the kind unless given.
      files: to read.
    """

    kind: str
    name: str
    files: Files


def parse_wanted(text: str) -> Wanted:
    """Parses ``KIND[@NAME]=PATH[:PICTURES[:ANSWERS]]``, as ``pope=coco_pope_random.json:val2014``.

    Raises:
      InputError: another form, an unknown kind, a name that cannot be a file's or is a metric's, too many paths.
    """
    head, mark, tail = text.partition("=")
    kind, _, name = head.partition("@")
    if kind not in KINDS:
        raise InputError(f"tasks: expected one of {', '.join(KINDS)}, found {kind!r}{nearest(kind, KINDS)}")
    known, name = KINDS[kind], name or kind
    form = f"{kind}[@NAME]={known.files}"
    parts = tail.split(":")
    if not mark or not all(parts) or len(parts) > known.files.count(":") + 1:
        raise InputError(f"tasks: expected {form}, found {text!r}")
    if not name.replace("-", "").replace("_", "").isalnum() or name in (*FEATURES, "predictions"):
        raise InputError(f"tasks: {text!r}: expected a name of letters, digits, - and _ that is no metric's own")
    path, images, annotations = (Path(part).expanduser() if part else None for part in (*parts, "", "")[:3])
    assert path is not None
    return Wanted(kind, name, Files(path, images, annotations))


def open_task(wanted: Wanted, options: Options | None = None) -> Task:
    """Reads a task's questions; pictures are read when they are asked for.

    Raises:
      InputError: naming file and field, what the readers refuse; choices or candidates where there can be none.
    """
    options, kind = options or Options(), KINDS[wanted.kind]
    source, questions = kind.read(wanted.files, options)
    mode: Literal["write", "choose", "rank"] = kind.mode
    if options.candidates:
        choices = read_candidates(options.candidates)
        if any(question.choices for question in questions):
            raise InputError(
                f"candidates: {wanted.name}: expected open questions, found some with choices of their own"
            )
        questions = [dataclasses.replace(question, choices=choices) for question in questions]
    if (options.choose or options.candidates) and mode == "write":
        mode = "choose"
    task = Task(
        name=wanted.name,
        source=source,
        questions=questions,
        score=kind.score,
        mode=mode,
        main=kind.main,
        new_tokens=options.new_tokens or kind.new_tokens,
        lettered=kind.lettered,
        mean=options.mean,
        restrict=kind.restrict,
    )
    if mode == "choose":
        for question in questions:
            task.ranked(question)
    return task


def read_candidates(path: Path | str) -> tuple[str, ...]:
    """Reads a text file with an answer a line; raises InputError where there is none or one comes twice."""
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"candidates: {path} cannot be read: {error}") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if len(found) < 2 or len(set(found)) != len(found):
        raise InputError(f"candidates: {path}: expected two answers or more, each once, found {len(found)}")
    return found


def check_names(tasks: Sequence[Wanted]) -> None:
    """Raises InputError where two tasks would be filed under one name."""
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"tasks: {name!r} is given twice; tell them apart as {name}@first=... and {name}@second=..."
            )
