"""What an evaluation task is: pictures, questions about them, and a pure function that scores answers."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tove_jax.data.picture import PictureSource
from tove_jax.errors import InputError

LETTERS = string.ascii_uppercase


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      id: unique in its task, stable between runs and machines.
      pictures: numbers of its pictures in the task's source; empty: text alone.
      prompt: the user's turn, whole.
      answers: the right ones as published, all that were given; empty where they are secret.
      choices: of which one is the answer; empty for an open question.
      group: kind of question, for scores by group, or "".
      unit: questions with the same one are scored together (MME's two of a picture, MMBench's rotations of one), or ""
        for a question on its own. A limit never divides a unit.
    """

    id: str
    pictures: tuple[int, ...]
    prompt: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    group: str = ""
    unit: str = ""


class Scores(NamedTuple):
    """What a scorer found.

    Attributes:
      metrics: flat names to numbers; from 0 to 1, but for CIDEr (from 0 to 10) and ``points/`` (MME's own).
      each: for those metrics that are means over questions, float64 (questions,), NaN where one does not count.
    """

    metrics: dict[str, float]
    each: dict[str, np.ndarray]


Scorer = Callable[[Sequence[Question], Sequence[Any]], Scores]
Mode = Literal["write", "choose", "rank"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A set of questions and how answers to it are judged.

    Attributes:
      name: how results are filed.
      source: of the pictures.
      questions: in a stable order.
      score: the scorer; it takes texts, or with `mode` ``rank`` float arrays (choices,).
      mode: ``write``: text is generated; ``choose``: the likeliest choice is the answer; ``rank``: the
        log-likelihoods of all choices are.
      main: the metric that stands for the task.
      new_tokens: of an answer at most.
      lettered: choices are shown with letters, and letters are ranked in their place.
      mean: rank by log-likelihood per token.
      restrict: makes the questions of a part of them, where they refer to each other.
    """

    name: str
    source: PictureSource
    questions: Sequence[Question]
    score: Scorer
    mode: Mode = "write"
    main: str = "accuracy"
    new_tokens: int = 128
    lettered: bool = False
    mean: bool = False
    restrict: Callable[[Sequence[Question]], list[Question]] | None = None

    def ranked(self, question: Question) -> tuple[str, ...]:
        """Returns the texts that are ranked for a question; raises InputError where there are none."""
        if not question.choices:
            raise InputError(f"{self.name}: question {question.id!r}: expected choices to rank, found none")
        if not self.lettered:
            return question.choices
        if len(question.choices) > len(LETTERS):
            raise InputError(f"{self.name}: question {question.id!r}: expected at most {len(LETTERS)} choices")
        return tuple(LETTERS[: len(question.choices)])


def plain_name(name: str) -> str:
    """Returns a group's name as part of a metric's: lower case, no white space."""
    return "_".join(name.lower().split())


def mean_of(values: np.ndarray) -> float:
    """Returns the mean of what is not NaN; 0 where there is nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else 0.0


def by_group(name: str, values: np.ndarray, questions: Sequence[Question]) -> Scores:
    """Returns the mean of values over all questions, and as ``name/group`` over each group, sorted by name.

    Args:
      name: of the metric.
      values: float (questions,), NaN where one does not count.
      questions: their groups.
    """
    each = {name: np.asarray(values, np.float64)}
    groups = np.array([plain_name(question.group) for question in questions], dtype=object)
    for group in sorted(set(groups) - {""}):
        each[f"{name}/{group}"] = np.where(groups == group, each[name], np.nan)
    return Scores({key: mean_of(found) for key, found in each.items()}, each)


def check_answers(questions: Sequence[Question], answers: Sequence[Any]) -> None:
    """Raises InputError unless there is one answer a question and each question has a right one."""
    if len(questions) != len(answers):
        raise InputError(f"score: expected {len(questions)} answers, found {len(answers)}")
    if not questions:
        raise InputError("score: expected questions, found none")
    for question in questions:
        if not question.answers:
            raise InputError(f"score: question {question.id!r}: expected a right answer, found none")


def group_by(questions: Sequence[Question], key: Callable[[Question], str]) -> Mapping[str, list[int]]:
    """Returns the places of questions by a key, in the order of first appearance."""
    places: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        places.setdefault(key(question), []).append(place)
    return places
