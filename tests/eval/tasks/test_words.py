"""The VQA evaluation's normalisation: one case a rule, its odd corners among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tove_jax.eval.tasks import words

CASES = json.loads((Path(__file__).parents[2] / "goldens/eval/vqa_words.json").read_text())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Yes\n", "yes"),
        ("The man", "man"),
        ("an apple and a pear", "apple and pear"),
        ("none", "0"),
        ("Two or ten", "2 or 10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes are missing, the table knows one
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the table's own reverse
        ("she's", "she's"),
        ("red, blue", "red blue"),  # a space beside the comma: removed
        ("red,blue", "red blue"),  # none: it becomes one
        ("red;blue, green", "red blue green"),
        ("black-and-white", "black and white"),
        ("black -and-white", "black andwhite"),  # one space beside one hyphen, and all of them go
        ("3,000", "3000"),
        ("3,000 red/blue", "3000 redblue"),  # a comma between digits removes every sign
        ("2.5", "2.5"),
        ("u.s.a.", "usa"),
        ("10:30", "10:30"),
        ("dog's", "dog's"),
        ("what?!", "what"),
    ],
)
def test_rules(text, expected):
    assert words.normalize(text) == expected


def test_only_32_full_stops_are_removed():
    assert words.strip_punctuation("." * 40) == "." * 8


def test_a_second_normalisation_sets_possessives_apart():
    assert words.normalize_challenge("The dog's, red?") == "dog 's red"
    assert words.normalize_challenge("3,000") == "3000"


def test_as_the_published_code_has_it():
    assert len(CASES["cases"]) > 100
    for text, vqa, challenge in CASES["cases"]:
        assert words.normalize(text) == vqa, text
        assert words.normalize_challenge(text) == challenge, text
