"""Letters in answers, and ScienceQA."""

from __future__ import annotations

import pytest

from tove_jax.eval.tasks import letters
from tove_jax.eval.tasks.base import Question


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("B. the sun", "B"), ("The answer is C.", "C"), ("I think. The answer is A", "A"),
        ("A\nbecause", "A"), ("E", None), ("b", None), ("Bears", None), ("", None), ("The answer is Cat", None),
    ],
)  # fmt: skip
def test_named(answer, letter):
    assert letters.named_letter(answer, 4) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"), ("(C)", "C"), ("C) a dog", "C"), ("Option B.", "B"), ("A or B", None), ("A", "A"),
        ("A red bird sits here", None), ("it is a teddy Bear, surely", "B"), ("a dog and a cat", None), ("D: fish", "D"),
        ("The answer is A. I think", "A"),
    ],
)  # fmt: skip
def test_inferred(answer, letter):
    assert letters.inferred_letter(answer, ["cat", "teddy bear", "dog", "fish"]) == letter


def test_scienceqa_and_its_questions_with_a_picture():
    choices = ("sun", "moon", "star")
    questions = [
        Question("1", (0,), "?", ("moon",), choices, "natural science"),
        Question("2", (), "?", ("star",), choices, "natural science"),
        Question("3", (), "?", ("sun",), choices[:2], "language science"),
    ]
    found = letters.score_scienceqa(questions, ["B. moon", "A", "C"])
    assert found.metrics == pytest.approx(
        {
            "accuracy": 1 / 3,
            "accuracy/natural_science": 0.5,
            "accuracy/language_science": 0.0,
            "accuracy/image": 1.0,
            "accuracy/text": 0.0,
        }
    )
