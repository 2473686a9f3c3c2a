"""Questions whose choices have letters: ScienceQA, and reading letters out of answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tove_jax.eval.tasks.base import LETTERS, Question, Scores, by_group, check_answers

_WRAPPED = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def named_letter(answer: str, count: int) -> str | None:
    """Returns the letter that an answer names as LLaVA reads ScienceQA's: ``B``, ``B. text`` or ``The answer is B``.

    Args:
      answer: as written.
      count: of the choices; letters beyond them are not read.
    """
    text = answer.replace("\n", ". ").strip()
    found = re.match(r"([A-Z])(?:$|\.(?: |$))", text) or re.search(r"The answer is ([A-Z])\b", text)
    return found[1] if found and found[1] in LETTERS[:count] else None


def inferred_letter(answer: str, choices: Sequence[str]) -> str | None:
    """Returns the letter that an answer gives by MMBench's rules before its judge model (arXiv:2307.06281, 4.3).

    One letter alone as a word, bare or with one kind of punctuation; ``A`` among more than three words may be an
    article and does not count bare. Otherwise the one choice whose text the answer contains.

    Args:
      answer: as written.
      choices: texts, in the order of their letters.
    """
    words = answer.split()
    letters = LETTERS[: len(choices)]
    for form in _WRAPPED:
        named = [letter for letter in letters if form.format(letter) in words]
        if len(named) == 1 and not (form == "{}" and "A" in named and len(words) > 3):
            return named[0]
    low = answer.lower()
    held = [letter for letter, choice in zip(letters, choices, strict=True) if choice.lower() in low]
    return held[0] if len(held) == 1 else None


def score_scienceqa(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """``accuracy``, that of the questions with a picture as ``accuracy/image``, without as ``accuracy/text``, by subject.

    A question's answer is the text of the right choice; an answer without a letter is wrong.
    """
    check_answers(questions, answers)
    right = []
    for question, answer in zip(questions, answers, strict=True):
        letter = named_letter(answer, len(question.choices))
        right.append(letter is not None and question.choices[LETTERS.index(letter)] == question.answers[0])
    found = by_group("accuracy", np.array(right, np.float64), questions)
    pictured = np.array([len(question.pictures) > 0 for question in questions])
    for name, rows in (("image", pictured), ("text", ~pictured)):
        if rows.any():
            found.each[f"accuracy/{name}"] = np.where(rows, found.each["accuracy"], np.nan)
            found.metrics[f"accuracy/{name}"] = float(found.each["accuracy"][rows].mean())
    return found
