"""Asks a run's model about a few pictures it held out, and where it looked for its answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.config.schema import Config
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.eval.answerers import open_answerer
from tove_jax.eval.answers_table import read_told
from tove_jax.eval.ask_tasks import Model
from tove_jax.eval.tasks import held_out
from tove_jax.eval.tasks.base import Question
from tove_jax.eval.tasks.registry import KINDS
from tove_jax.eval.tasks.vqa import exact_match
from tove_jax.language.chat import Chat
from tove_jax.language.decode import Decoding
from tove_jax.language.saliency import look
from tove_jax.report.asked import Asked
from tove_jax.report.maps import SIDE, overlay

_TASK = "held_out"


def choose_questions(questions: Sequence[Question], count: int) -> list[Question]:
    """Picks questions about a picture each, spread evenly over the pictures, the groups in turn.

    What was answered does not count. Questions about several pictures, or none, are left out.

    Args:
      questions: in a stable order.
      count: at most; 0: none.
    """
    about: dict[int, list[Question]] = {}
    for question in questions:
        if len(question.pictures) == 1:
            about.setdefault(question.pictures[0], []).append(question)
    groups = list(dict.fromkeys(question.group for question in questions))
    asked = list(about.values())
    places = np.linspace(0, len(asked) - 1, min(count, len(asked))).round().astype(int)
    chosen = []
    for number, place in enumerate(places):
        turns = [(groups.index(question.group) - number) % len(groups) for question in asked[place]]
        chosen.append(asked[place][turns.index(min(turns))])
    return chosen


def _kept(workdir: Path) -> Mapping[str, Mapping[str, Any]]:
    """Returns what this very model answered to the task before, by the question's id."""
    if not (workdir / "eval" / f"{_TASK}.jsonl").exists():
        return {}
    told = read_told(workdir, _TASK)
    return told.records if told.settings.get("model") == Model(str(workdir)).describe() else {}


def make_asked(config: Config, workdir: Path, count: int) -> tuple[Asked, ...]:
    """Asks about held-out pictures; answers that are kept are taken, the others given now.

    Args:
      config: the run's settings.
      workdir: the run's folder.
      count: pictures at most.

    Raises:
      InputError: nothing was held out, or the model cannot be opened.
    """
    source, questions = held_out.of_config(config, workdir)
    chosen = choose_questions(questions, count)
    if not chosen:
        raise InputError(f"{workdir}: expected questions about one held-out picture each, found none")
    chat = open_answerer(workdir)
    assert isinstance(chat, Chat)  # of a run
    images = [source[question.pictures[0]].image for question in chosen]
    kept = _kept(workdir)
    told = [kept.get(question.id, {}) for question in chosen]
    answers = [
        one.get("answer") if one.get("prompt") == question.prompt else None
        for question, one in zip(chosen, told, strict=True)
    ]
    fresh = [place for place, answer in enumerate(answers) if answer is None]
    given = chat.answer(
        [[images[place]] for place in fresh],
        [chosen[place].prompt for place in fresh],
        Decoding(new_tokens=KINDS[_TASK].new_tokens),
    )
    for place, answer in zip(fresh, given, strict=True):
        answers[place] = answer
    texts, view = [str(answer) for answer in answers], dataclasses.replace(View.of_student(config.student), size=SIDE)
    found = []
    for question, image, text, (maps, chance) in zip(
        chosen, images, texts, _looks(chat, images, chosen, texts), strict=True
    ):
        shown = view.cut(image)
        found.append(
            Asked(
                id=source.ids[question.pictures[0]],
                question=question.prompt,
                right=question.answers[0],
                answer=text,
                correct=bool(exact_match(text, question.answers)),
                image=shown,
                look=None if maps is None else overlay(shown, maps),
                chance=chance,
            )
        )
    return tuple(found)


def _looks(
    chat: Chat, images: Sequence[np.ndarray], questions: Sequence[Question], answers: Sequence[str]
) -> list[tuple[np.ndarray | None, float | None]]:
    """Returns each answer's map and probability; neither where the answer is none that a template can hold."""
    found: list[tuple[np.ndarray | None, float | None]] = [(None, None)] * len(answers)
    places = [place for place, answer in enumerate(answers) if _can_be_told(chat, questions[place].prompt, answer)]
    try:
        looks = look(
            chat,
            [[images[place]] for place in places],
            [questions[place].prompt for place in places],
            [answers[place] for place in places],
        )
    except InputError:  # an answer that was cut off may, with its end, be longer than the model reads
        return found
    for place, one in zip(places, looks, strict=True):
        found[place] = (one.maps[0], math.exp(one.log_likelihood))
    return found


def _can_be_told(chat: Chat, prompt: str, answer: str) -> bool:
    try:
        chat.divided(prompt, 1, [answer])
    except InputError:
        return False
    return True
