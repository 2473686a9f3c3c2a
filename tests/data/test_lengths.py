"""Token lengths: those of the encoded conversations, kept on disk under what they depend on, errors by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.data.test_conversation import CASES, llama, small  # noqa: F401
from tove_jax.data import lengths
from tove_jax.data.conversation import TEMPLATES, encode, expand_images, without_pictures
from tove_jax.data.dialogue import Dialogue, StoredDialogues
from tove_jax.data.lengths import dialogue_lengths, picture_counts
from tove_jax.errors import InputError

V1 = TEMPLATES["v1"]


def say(id, *texts, pictures=()):
    turns = tuple({"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts))
    return Dialogue(id, pictures, turns)


DIALOGUES = [
    say("one", "<image>\nHow many?", "Two cups.", pictures=(0,)),
    say("two", "A <image> and <image> ?", "Red.", "And now?", "Blue  cups", pictures=(1, 0)),
    say("none", "What colour?", "Red. " * 5),
]


@pytest.mark.parametrize("name", ["v1", "chatml", "llava_llama_2"])
def test_lengths_are_those_of_the_encoded_rows(small, name):  # noqa: F811
    template = TEMPLATES[name]
    for picture_tokens, limit in ((9, 1000), (9, 30)):
        rows = [
            expand_images(
                encode(one.turns, template, small, images=len(one.pictures)),
                [picture_tokens] * len(one.pictures),
                limit,
            )
            for one in DIALOGUES
        ]
        found = dialogue_lengths(DIALOGUES, template, small, picture_tokens=picture_tokens, limit=limit)
        assert found.dtype == np.int32 and found.tolist() == [len(row) for row in rows]
    bare = dialogue_lengths(DIALOGUES, template, small, picture_tokens=0, limit=1000)
    for one, length in zip(DIALOGUES, bare, strict=True):
        row = without_pictures(encode(one.turns, template, small, images=len(one.pictures)))
        assert len(row.ids) == len(row.labels) == length and (row.ids >= 0).all() and not len(row.starts)
    assert (dialogue_lengths(DIALOGUES, template, small, picture_tokens=1, limit=1000) - bare).tolist() == [1, 2, 0]
    assert picture_counts(DIALOGUES).tolist() == [1, 2, 0]


def test_golden_lengths_of_llava(llama):  # noqa: F811
    for case in CASES:
        one = Dialogue(case["name"], (0,) * int(case["has_image"]), tuple(case["conversation"]))
        found = dialogue_lengths([one], TEMPLATES[case["template"]], llama, picture_tokens=1, limit=2048)
        assert found.tolist() == [len(case["input_ids"])], case["name"]


def test_counts_are_kept(small, tmp_path, monkeypatch):  # noqa: F811
    stored = StoredDialogues()
    for one in DIALOGUES:
        stored.append(one.id, one.pictures, one.turns)

    def count(dialogues=stored, template=V1, tokenizer=small, picture_tokens=9, limit=1000):
        return dialogue_lengths(
            dialogues, template, tokenizer, picture_tokens=picture_tokens, limit=limit, cache=tmp_path, progress=False
        )

    first = count()
    (file,) = (tmp_path / "text-lengths").glob("*.npy")
    with monkeypatch.context() as patch:
        patch.setattr(lengths, "_count", lambda *_: pytest.fail("counted again"))
        assert count(DIALOGUES).tolist() == first.tolist()
        assert count(limit=30, picture_tokens=4).tolist() == [
            min(30, whole - 5 * pictures) for whole, pictures in zip(first, (1, 2, 0), strict=True)
        ]
    for damage in (b"", b"junk", file.read_bytes()[:-1]):
        file.write_bytes(damage)
        assert count().tolist() == first.tolist() and np.load(file).shape == (3,)
    monkeypatch.setattr(lengths, "_count", lambda dialogues, *_: np.full(len(dialogues), 500, np.int32))
    other_text = [*DIALOGUES[:2], say("none", "What colour?", "Red.")]
    for changed in (
        {"dialogues": other_text},
        {"template": TEMPLATES["chatml"]},
        {"template": dataclasses.replace(V1, system="")},
        {"tokenizer": dataclasses.replace(small, begin=None)},
    ):
        assert count(**changed).max() >= 500
    assert not list((tmp_path / "text-lengths").glob("*.tmp"))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Dialogue("x", (), ({"from": "user", "value": "Hi"},)), "conversation 'x': turn 0: unknown role"),
        (say("x", "Hi", " "), "conversation 'x': turn 1: empty answer"),
        (say("x", "<image>\nHi", "Yes"), "conversation 'x': image token without image: expected 0"),
        (say("x", "Hi", "Yes", pictures=(0,)), "conversation 'x': image without image token"),
        (say("x", "Hi"), "conversation 'x': expected a question and its answer"),
    ],
)
def test_errors_name_the_conversation(small, tmp_path, broken, message):  # noqa: F811
    with pytest.raises(InputError, match=message):
        dialogue_lengths([*DIALOGUES, broken], V1, small, picture_tokens=1, limit=9, cache=tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.npy"))
