"""Captioning, and tasks that rank texts by likelihood: retrieval and zero-shot classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.data.coco import CocoSource
from tove_jax.data.folder import FolderSource
from tove_jax.data.picture import PictureSource
from tove_jax.data.vqa import split_parts
from tove_jax.errors import InputError
from tove_jax.eval.tasks.base import Question, Scores, by_group, check_answers
from tove_jax.eval.tasks.caption_scores import bleu, cider, rouge_l
from tove_jax.eval.tasks.caption_words import split_words

REQUEST = "Provide a one-sentence caption for the provided image."
"""LLaVA-1.5's request for a caption, as in its instruction mix (arXiv:2310.03744)."""
CLASS_TEXT = "a photo of a {}."
"""CLIP's text of a class (Radford et al., arXiv:2103.00020)."""


def open_captions(path: Path | str, images: Path | str | None) -> tuple[Any, list[tuple[str, ...]]]:
    """Opens a source of pictures, and all captions of each.

    Args:
      path: COCO's JSON, Karpathy's with ``#test``, or a folder of pictures with ``captions.json`` or ``captions.txt``.
      images: folder of the pictures of a JSON; None: where the JSON is.

    Raises:
      InputError: what the source refuses, a picture without a caption.
    """
    file, _ = split_parts(path)
    if file.is_dir():
        folder = FolderSource(file)
        captions = [caption for caption in folder.captions if caption is not None and caption.strip()]
        if len(captions) != len(folder):
            raise InputError(f"{file}: expected a caption for each of {len(folder)} pictures, found {len(captions)}")
        return folder, [(caption,) for caption in captions]
    source = CocoSource(path, images or file.parent)
    return source, source.references


def caption_questions(source: PictureSource, references: Sequence[Sequence[str]], prompt: str) -> list[Question]:
    """Returns a question a picture; its right answers are all its captions."""
    return [
        Question(id, (number,), prompt, tuple(told))
        for number, (id, told) in enumerate(zip(source.ids, references, strict=True))
    ]


def score_captions(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """``cider`` (0 to 10; papers give it times 100), ``bleu_1`` to ``bleu_4`` of the corpus, ``rouge_l``."""
    check_answers(questions, answers)
    candidates = [split_words(answer) for answer in answers]
    references = [[split_words(caption) for caption in question.answers] for question in questions]
    corpus, _ = bleu(candidates, references)
    each = {"cider": cider(candidates, references), "rouge_l": rouge_l(candidates, references)}
    metrics = {name: float(values.mean()) for name, values in each.items()}
    return Scores({**metrics, **{f"bleu_{order}": float(corpus[order - 1]) for order in (1, 2, 3, 4)}}, each)


def retrieval_questions(source: PictureSource, references: Sequence[Sequence[str]], prompt: str) -> list[Question]:
    """Returns a question a picture, whose choices are the captions of all pictures."""
    return among_themselves(caption_questions(source, references, prompt))


def among_themselves(questions: Sequence[Question]) -> list[Question]:
    """Returns questions whose choices are the right answers of all of them."""
    choices = tuple(caption for question in questions for caption in question.answers)
    return [dataclasses.replace(question, choices=choices) for question in questions]


def score_retrieval(questions: Sequence[Question], answers: Sequence[np.ndarray]) -> Scores:
    """Recall at 1, 5 and 10 in both directions, from log-likelihoods of all captions after each picture.

    ``picture/recall@k``: a caption's own picture is among the k after which it is likeliest. ``text/recall@k``: one of
    a picture's own captions is among its k likeliest; ``text_debiased/recall@k`` the same after each caption's mean
    probability over the pictures is divided out, since a language model likes some captions whatever it sees (Lin et al.,
    arXiv:2306.01879). Equal likelihoods count as wrong. Questions must be those of `retrieval_questions`, all of them.

    Raises:
      InputError: questions with other choices than all their captions.
    """
    check_answers(questions, answers)
    owner = np.array([place for place, question in enumerate(questions) for _ in question.answers])
    captions = tuple(caption for question in questions for caption in question.answers)
    if any(question.choices != captions for question in questions):
        raise InputError("retrieval: expected each picture's choices to be the captions of all questions")
    told = np.stack([np.asarray(answer, np.float64) for answer in answers])
    marginal = np.logaddexp.reduce(told, axis=0) - np.log(len(told))
    own = owner[None, :] == np.arange(len(questions))[:, None]
    each: dict[str, np.ndarray] = {}
    for name, matrix in (("text", told), ("text_debiased", told - marginal)):
        best = np.where(own, matrix, -np.inf).max(axis=1)
        rank = (np.where(own, -np.inf, matrix) >= best[:, None]).sum(axis=1)
        each.update({f"{name}/recall@{k}": (rank < k).astype(np.float64) for k in (1, 5, 10)})
    mine = told[owner, np.arange(len(owner))]
    rank = (np.where(own, -np.inf, told) >= mine).sum(axis=0)
    metrics = {name: float(values.mean()) for name, values in each.items()}
    metrics.update({f"picture/recall@{k}": float((rank < k).mean()) for k in (1, 5, 10)})
    return Scores(metrics, each)


def class_questions(
    source: PictureSource, prompt: str, text: str = CLASS_TEXT, numbers: Sequence[int] | None = None
) -> list[Question]:
    """Returns a question a labelled picture, whose choices are the texts of all labels.

    Args:
      source: with labels.
      prompt: what is asked.
      text: of a class, its name for ``{}``; underscores in names become spaces.
      numbers: of the pictures; None: all.

    Raises:
      InputError: fewer than two labels, a text without a place for the name.
    """
    if "{}" not in text:
        raise InputError(f"text of a class: expected a place {{}} for its name, found {text!r}")
    chosen = range(len(source)) if numbers is None else numbers
    labels = {number: label for number in chosen if (label := source.labels[number]) is not None}
    names = sorted(set(labels.values()))
    if len(names) < 2:
        raise InputError(f"{source.name}: expected pictures of two labels or more, found {names}")
    texts = {name: text.format(name.replace("_", " ")) for name in names}
    choices = tuple(texts.values())
    return [
        Question(source.ids[number], (number,), prompt, (texts[label],), choices, label)
        for number, label in labels.items()
    ]


def score_classes(questions: Sequence[Question], answers: Sequence[np.ndarray]) -> Scores:
    """``accuracy``, by class, ``accuracy_top5`` and ``accuracy_class_mean``; equal likelihoods count as wrong.

    ``accuracy_debiased`` is after each class's mean probability over the pictures is divided out, see `score_retrieval`.
    """
    check_answers(questions, answers)
    told = np.stack([np.asarray(answer, np.float64) for answer in answers])
    right = np.array([question.choices.index(question.answers[0]) for question in questions])
    rows = np.arange(len(questions))

    def ranks(matrix: np.ndarray) -> np.ndarray:
        return (matrix >= matrix[rows, right][:, None]).sum(axis=1) - 1

    found = by_group("accuracy", (ranks(told) == 0).astype(np.float64), questions)
    marginal = np.logaddexp.reduce(told, axis=0) - np.log(len(told))
    more = {"accuracy_top5": ranks(told) < 5, "accuracy_debiased": ranks(told - marginal) == 0}
    by_class = [value for name, value in found.metrics.items() if name.startswith("accuracy/")]
    found.metrics["accuracy_class_mean"] = float(np.mean(by_class)) if by_class else found.metrics["accuracy"]
    found.metrics.update({name: float(values.mean()) for name, values in more.items()})
    found.each.update({name: values.astype(np.float64) for name, values in more.items()})
    return found
