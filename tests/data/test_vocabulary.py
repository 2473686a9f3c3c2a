"""Words and their numbers: deterministic, kept with the run, refused when they are other words."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tove_jax.data.vocabulary import Vocabulary, split_words
from tove_jax.errors import InputError

CAPTIONS = ["A red car.", "a RED bus", None, "blue car; a cat's tail", "", "zebra, ant: zebra ant"]


def test_words_are_split_counted_and_ordered():
    assert split_words("Keycap: *  woman's_hat É") == ["keycap", "woman", "s", "hat", "é"]
    words = Vocabulary.build(CAPTIONS, size=9, minimum=2, length=4)
    # a: 3; ant, car, red, zebra: 2, in alphabetical order.
    assert words.words == ("a", "ant", "car", "red", "zebra")
    assert Vocabulary.build(reversed(CAPTIONS), size=9, minimum=2, length=4) == words
    assert Vocabulary.build(CAPTIONS, size=3, minimum=2, length=4).words == ("a", "ant", "car")


def test_captions_become_distinct_numbers_padded_with_minus_one():
    words = Vocabulary(("a", "car", "red"), length=3)
    table = words.encode(["red red car", "nothing", None, "a car a red sky", "car"])
    np.testing.assert_array_equal(table, [[2, 1, -1], [-1] * 3, [-1] * 3, [0, 1, 2], [1, -1, -1]])
    assert table.dtype == np.int32
    assert Vocabulary(("a", "car", "red"), length=1).encode(["car red"]).tolist() == [[1]]


def test_no_words_are_refused():
    with pytest.raises(InputError, match="2 times or more in the training captions, found none"):
        Vocabulary.build([None, "once"], size=9, minimum=2, length=4)
    with pytest.raises(InputError, match="found size 0"):
        Vocabulary.build(CAPTIONS, size=0, minimum=2, length=4)


def test_the_sidecar_comes_back_and_other_words_are_refused(tmp_path):
    words = Vocabulary.build(CAPTIONS, size=9, minimum=2, length=4)
    words.write(tmp_path)
    assert Vocabulary.read(tmp_path, words.hash) == words
    assert words.hash != Vocabulary(words.words[::-1], 4).hash != Vocabulary(words.words[::-1], 5).hash
    with pytest.raises(InputError, match="expected the words the run was trained with"):
        Vocabulary.read(tmp_path, "0" * 16)
    path = tmp_path / "vocabulary.json"
    for broken in ("{", "[]", json.dumps({"format": "other", "words": [], "length": 3})):
        path.write_text(broken)
        with pytest.raises(InputError, match="expected a vocabulary"):
            Vocabulary.read(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="no vocabulary here"):
        Vocabulary.read(tmp_path)
