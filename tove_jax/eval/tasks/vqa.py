"""Open questions with short answers: VQAv2, TextVQA, VizWiz, GQA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tove_jax.eval.tasks import words
from tove_jax.eval.tasks.base import Question, Scores, by_group, check_answers

STRUCTURAL = ("verify", "logical", "choose", "compare", "query")
"""GQA's structural types (Hudson and Manning, arXiv:1902.09506); ``query`` is open, the others are binary."""


def consensus(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy among several people's answers (Antol et al., arXiv:1505.00468, section 3).

    min(1, others who gave it / 3), averaged over leaving each person out; so with ten people 0, 0.3, 0.6, 0.9 and 1
    for 0, 1, 2, 3 and more of them.

    Args:
      prediction: normalised.
      answers: normalised, one a person.
    """
    given = sum(answer == prediction for answer in answers)
    without = given * min(1.0, (given - 1) / 3) if given else 0.0
    return (without + (len(answers) - given) * min(1.0, given / 3)) / len(answers)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy of one answer.

    As the VQA evaluation does it: the prediction is normalised whole, people's answers (published without articles and
    number words) lose punctuation alone, and that only where they differ.
    """
    if len(set(answers)) > 1:
        answers = [words.strip_punctuation(answer) for answer in answers]
    return consensus(words.normalize(prediction), answers)


def challenge_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's and VizWiz's accuracy of one answer: both sides by `words.normalize_challenge`."""
    return consensus(words.normalize_challenge(prediction), [words.normalize_challenge(answer) for answer in answers])


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """GQA's accuracy of one answer: equal but for case, outer white space and a final full stop."""
    return float(_bare(prediction) in {_bare(answer) for answer in answers})


def _bare(text: str) -> str:
    return text.strip().rstrip(".").lower()


def _mean(rule: Callable[[str, Sequence[str]], float], questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    check_answers(questions, answers)
    pairs = zip(questions, answers, strict=True)
    return by_group("accuracy", np.array([rule(answer, question.answers) for question, answer in pairs]), questions)


def score_vqav2(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """``accuracy``, and by type of answer ``accuracy/{yes/no,number,other}``."""
    return _mean(vqa_accuracy, questions, answers)


def score_challenge(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """``accuracy`` of TextVQA or VizWiz; of VizWiz also by type of answer."""
    return _mean(challenge_accuracy, questions, answers)


def score_exact(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """``accuracy`` by exact match, as GQA counts it, over all and by group."""
    return _mean(exact_match, questions, answers)


def score_gqa(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """``accuracy``, by structural type, and over ``accuracy/binary`` and ``accuracy/open`` ones."""
    found = _mean(exact_match, questions, answers)
    values = found.each["accuracy"]
    if all(question.group in STRUCTURAL for question in questions):
        is_open = np.array([question.group == "query" for question in questions])
        for name, rows in (("open", is_open), ("binary", ~is_open)):
            if rows.any():
                found.each[f"accuracy/{name}"] = np.where(rows, values, np.nan)
                found.metrics[f"accuracy/{name}"] = float(values[rows].mean())
    return found
