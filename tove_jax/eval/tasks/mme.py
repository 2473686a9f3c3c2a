"""MME (Fu et al., arXiv:2306.13394): two yes or no questions a picture, in 14 categories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tove_jax.data.decode import SUFFIXES
from tove_jax.data.records import NamedPictures
from tove_jax.data.vqa import SHORT_ANSWER
from tove_jax.errors import InputError
from tove_jax.eval.tasks.base import Question, Scores, check_answers, group_by, plain_name

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
OWN_REQUEST = "Please answer yes or no."
"""What MME's questions end with; LLaVA-1.5 was judged with its own request in its place."""


def read(path: Path | str, *, own_request: bool = False) -> tuple[NamedPictures, list[Question]]:
    """Reads the release folder: a folder a category, pictures and texts of ``question, tab, answer`` lines.

    Pictures lie beside the texts, or the two in ``images`` and ``questions_answers_YN``.

    Args:
      path: the folder.
      own_request: keep MME's `OWN_REQUEST` in place of LLaVA-1.5's.

    Raises:
      InputError: no categories, a line of another form, a text without a picture.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"{root}: expected MME's folder, found none")
    pictures, questions = NamedPictures(root), []
    known = (*PERCEPTION, *COGNITION)
    for folder in sorted(entry for entry in root.iterdir() if entry.name in known and entry.is_dir()):
        texts, images = folder / "questions_answers_YN", folder / "images"
        texts, images = texts if texts.is_dir() else folder, images if images.is_dir() else folder
        files = {entry.stem: entry for entry in sorted(images.iterdir()) if entry.suffix.lower() in SUFFIXES}
        for text in sorted(texts.glob("*.txt")):
            if text.stem not in files:
                raise InputError(f"{text}: expected a picture {text.stem} in {images}, found none")
            number = pictures.picture(files[text.stem].relative_to(root).as_posix())
            for line, (asked, answer) in enumerate(_lines(text)):
                bare = asked.removesuffix(OWN_REQUEST).strip()
                unit = f"{folder.name}/{text.stem}"
                questions.append(
                    Question(
                        f"{unit}/{line}",
                        (number,),
                        asked if own_request else f"{bare}\n{SHORT_ANSWER}",
                        (answer,),
                        ("Yes", "No"),
                        folder.name,
                        unit,
                    )
                )
    if not questions:
        raise InputError(f"{root}: expected folders such as existence/ with questions, found none")
    pictures.close_list(root)
    return pictures, questions


def _lines(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            asked, _, answer = line.rstrip().rpartition("\t")
            if not asked.strip() or answer.strip().lower() not in ("yes", "no"):
                raise InputError(f"{path}, line {number}: expected question, tab, Yes or No, found {line[:60]!r}")
            found.append((asked.strip(), answer.strip().lower()))
    if len(found) != 2:
        raise InputError(f"{path}: expected two questions, found {len(found)}")
    return found


def label_of(answer: str) -> str:
    """Returns ``yes``, ``no`` or ``other`` as MME's tool reads an answer: yes, or no, among its first four signs."""
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """MME's points: a category has 100 x (accuracy + share of pictures with both answers right), so 200 at most.

    ``points/{perception,cognition}`` are sums over their categories, ``points/total`` that of both,
    ``points/<category>`` each one's; ``accuracy`` and ``accuracy_plus`` the two shares over all, and by category.
    """
    check_answers(questions, answers)
    pairs = zip(questions, answers, strict=True)
    right = np.array([label_of(answer) == question.answers[0].lower() for question, answer in pairs])
    both = np.zeros(len(questions))
    for places in group_by(questions, lambda question: question.unit or question.id).values():
        both[places] = right[places].all()
    each = {"accuracy": right.astype(np.float64), "accuracy_plus": both}
    points: dict[str, float] = {}
    for group, places in group_by(questions, lambda question: question.group).items():
        mask = np.isin(np.arange(len(questions)), places)
        for name in ("accuracy", "accuracy_plus"):
            each[f"{name}/{plain_name(group)}"] = np.where(mask, each[name], np.nan)
        points[group] = 100 * float(right[places].mean() + both[places].mean())
    metrics = {name: float(np.nanmean(values)) for name, values in each.items()}
    sums = {
        kind: sum(points.get(name, 0.0) for name in names)
        for kind, names in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    metrics |= {f"points/{plain_name(name)}": value for name, value in points.items()}
    metrics |= {f"points/{kind}": value for kind, value in sums.items()} | {"points/total": sum(sums.values())}
    return Scores(metrics, each)
