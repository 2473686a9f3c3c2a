"""Accuracies of open questions."""

from __future__ import annotations

import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.eval.tasks import vqa
from tove_jax.eval.tasks.base import Question


def question(id, answers, group="", **more):
    return Question(id, (0,), "?", tuple(answers), group=group, **more)


@pytest.mark.parametrize(("given", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_people(given, expected):
    assert vqa.consensus("red", ["red"] * given + ["blue"] * (10 - given)) == pytest.approx(expected)


def test_people_are_left_out_one_by_one():
    answers = ["red"] * 2 + ["blue"] * 3 + ["b"] * 5
    left = [min(1, (answers[:i] + answers[i + 1 :]).count("blue") / 3) for i in range(10)]
    assert vqa.consensus("blue", answers) == pytest.approx(np.mean(left))


def test_vqav2_touches_people_only_where_they_differ():
    assert vqa.vqa_accuracy("two", ["two"] * 10) == 0.0  # "2" against people who all wrote a word
    assert vqa.vqa_accuracy("2", ["2"] * 10) == 1.0
    assert vqa.vqa_accuracy("red/blue", ["red/blue"] * 9 + ["green"]) == 1.0
    assert vqa.vqa_accuracy("red/blue", ["red/blue"] * 10) == 0.0
    assert vqa.challenge_accuracy("two", ["two"] * 10) == 1.0


def test_scores_by_type():
    questions = [question("a", ["yes"] * 10, "yes/no"), question("b", ["2"] * 10, "number"), question("c", ["x"] * 10)]
    found = vqa.score_vqav2(questions, ["Yes.", "3", "x"])
    assert found.metrics == pytest.approx({"accuracy": 2 / 3, "accuracy/yes/no": 1.0, "accuracy/number": 0.0})
    np.testing.assert_array_equal(found.each["accuracy/number"], [np.nan, 0.0, np.nan])


def test_gqa_is_equal_but_for_case_and_a_full_stop():
    questions = [question("a", ["Left"], "choose"), question("b", ["dog"], "query"), question("c", ["yes"], "verify")]
    found = vqa.score_gqa(questions, ["left.", "the dog", " Yes"])
    assert found.metrics["accuracy"] == pytest.approx(2 / 3)
    assert (found.metrics["accuracy/binary"], found.metrics["accuracy/open"]) == (1.0, 0.0)


def test_secret_or_missing_answers_are_refused():
    with pytest.raises(InputError, match="question 'a': expected a right answer"):
        vqa.score_gqa([question("a", [])], ["x"])
    with pytest.raises(InputError, match="expected 1 answers, found 2"):
        vqa.score_gqa([question("a", ["b"])], ["x", "y"])
