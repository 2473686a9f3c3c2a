"""A run's own held-out pictures: questions that training asked of others, asked of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tove_jax.config.schema import Config
from tove_jax.data import make_source
from tove_jax.data.conversation import IMAGE
from tove_jax.data.dialogue import dialogues_of
from tove_jax.data.questions import OpenMojiQuestions, questions
from tove_jax.data.split import split
from tove_jax.errors import InputError
from tove_jax.eval.tasks.base import Question
from tove_jax.train.checkpoint import load_settings
from tove_jax.train.language import chosen_dialogues

UNSEEN = ("name",)
"""Groups whose answers no other picture shares: they are learned from, and not asked."""


def read(run: Path) -> tuple[Any, list[Question]]:
    """Opens the pictures of a run and the questions about those that it held out.

    Of each conversation the first question is asked; of the embedded drawings all but their names, which no two
    share, with their choices and groups.

    Args:
      run: the run's folder; its settings say source and split.

    Returns:
      The source and the questions.

    Raises:
      InputError: no such run, or one that held nothing out.
    """
    return of_config(load_settings(run)[0], run)


def of_config(config: Config, run: Path) -> tuple[Any, list[Question]]:
    """Opens what `read` opens, of settings that may differ from the run's own in where pictures lie."""
    source = make_source(config.data)
    sides = split(source.ids, config.data.held_out, salt=config.data.split_salt, limit=config.data.limit)
    if isinstance(source, OpenMojiQuestions):
        number = {id: place for place, id in enumerate(source.ids)}
        found = [
            Question(one.id, (number[one.picture or ""],), one.question, one.answers, one.choices, one.group)
            for one in questions(source, sides.held_out)
            if one.group not in UNSEEN
        ]
    else:
        dialogues = dialogues_of(source)
        chosen = [dialogues[place] for place in chosen_dialogues(dialogues, sides)[1]]
        found = [
            Question(one.id, one.pictures, one.turns[0]["value"].removeprefix(IMAGE).strip(), (one.turns[1]["value"],))
            for one in chosen
            if len(one.turns) > 1 and one.turns[0]["from"] == "human"
        ]
    if not found:
        raise InputError(f"{run}: expected held-out pictures with questions, found none (config.data.held_out)")
    return source, found
