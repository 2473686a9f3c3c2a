"""Questions with two answers: POPE and VSR."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tove_jax.eval.tasks.base import Question, Scores, by_group, check_answers, group_by, plain_name


def pope_says_yes(answer: str) -> bool:
    """POPE's reading of an answer (Li et al., arXiv:2305.10355): no, if its first sentence has no, No or not."""
    first = answer.split(".")[0].replace(",", "")
    return not {"no", "No", "not"} & set(first.split(" "))


def _rates(said: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 of yes; 0 where nothing was said or asked that counts."""
    hits, said_yes, is_yes = int((said & truth).sum()), int(said.sum()), int(truth.sum())
    return {
        "accuracy": float((said == truth).mean()),
        "precision": hits / said_yes if said_yes else 0.0,
        "recall": hits / is_yes if is_yes else 0.0,
        "f1": 2 * hits / (said_yes + is_yes) if hits else 0.0,
        "yes_share": float(said.mean()),
    }


def score_pope(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """POPE's five numbers over all questions and ``/{random,popular,adversarial}``.

    ``f1_mean`` is the mean of the categories' F1, which LLaVA-1.5 reports as POPE.
    """
    check_answers(questions, answers)
    said = np.array([pope_says_yes(answer) for answer in answers])
    truth = np.array([question.answers[0] == "yes" for question in questions])
    metrics = _rates(said, truth)
    groups = group_by(questions, lambda question: plain_name(question.group))
    for group, places in groups.items():
        if group:
            metrics.update({f"{name}/{group}": value for name, value in _rates(said[places], truth[places]).items()})
    metrics["f1_mean"] = float(np.mean([metrics[f"f1/{group}" if group else "f1"] for group in groups]))
    each = by_group("accuracy", said == truth, questions).each
    each["yes_share"] = said.astype(np.float64)
    return Scores(metrics, each)


_YES = re.compile(r"\b(yes|true|correct)\b")
_NO = re.compile(r"\b(no|not|false|incorrect)\b")


def says_yes(answer: str) -> bool | None:
    """Whether an answer begins to affirm or to deny; None: neither, which is wrong either way. Ours."""
    text = answer.lower()
    yes, no = _YES.search(text), _NO.search(text)
    if yes is None and no is None:
        return None
    return no is None or (yes is not None and yes.start() < no.start())


def score_vsr(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Accuracy on VSR's statements (Liu et al., arXiv:2205.00363), ``accuracy`` and by relation.

    ``unclear`` is the share of answers that neither affirm nor deny.
    """
    check_answers(questions, answers)
    said = [says_yes(answer) for answer in answers]
    right = [
        one is not None and one == (question.answers[0].lower() in ("yes", "true"))
        for question, one in zip(questions, said, strict=True)
    ]
    found = by_group("accuracy", np.array(right, np.float64), questions)
    unclear = np.array([one is None for one in said], np.float64)
    return Scores({**found.metrics, "unclear": float(unclear.mean())}, {**found.each, "unclear": unclear})
