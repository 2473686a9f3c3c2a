"""POPE and VSR."""

from __future__ import annotations

import pytest

from tove_jax.eval.tasks import yes_no
from tove_jax.eval.tasks.base import Question


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", True), ("no", False), ("No, there is none.", False), ("There is not one", False), ("NO", True),
        ("Yes. It does not move.", True), ("", True), ("nothing", True),
    ],
)  # fmt: skip
def test_pope_reads_the_first_sentence(answer, expected):
    assert yes_no.pope_says_yes(answer) is expected


def test_pope_counts_yes():
    truth = ["yes", "yes", "no", "no", "yes", "no"]
    said = ["Yes", "No", "Yes", "No", "Yes", "No"]
    groups = ["random"] * 4 + ["popular"] * 2
    questions = [Question(str(i), (0,), "?", (a,), group=g) for i, (a, g) in enumerate(zip(truth, groups, strict=True))]
    found = yes_no.score_pope(questions, said)
    metrics = found.metrics
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert (metrics["precision"], metrics["recall"], metrics["f1"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert metrics["yes_share"] == 0.5
    assert (metrics["f1/random"], metrics["f1/popular"], metrics["f1_mean"]) == (0.5, 1.0, 0.75)
    assert set(found.each) == {"accuracy", "accuracy/random", "accuracy/popular", "yes_share"}


def test_pope_without_a_yes():
    found = yes_no.score_pope([Question("a", (0,), "?", ("yes",))], ["no"])
    assert [found.metrics[name] for name in ("precision", "recall", "f1", "f1_mean")] == [0.0] * 4


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("True", True), ("yes, it is not far", True), ("No.", False), ("False", False), ("That is incorrect", False),
        ("it is not true", False), ("a cat", None), ("know", None),
    ],
)  # fmt: skip
def test_vsr_affirms_or_denies(answer, expected):
    assert yes_no.says_yes(answer) is expected


def test_vsr_by_relation():
    questions = [Question("0", (0,), "?", ("yes",), group="left of"), Question("1", (0,), "?", ("no",), group="on")]
    found = yes_no.score_vsr(questions, ["True", "maybe"])
    assert found.metrics == {"accuracy": 0.5, "accuracy/left_of": 1.0, "accuracy/on": 0.0, "unclear": 0.5}
