"""MMBench: the published table and circular accuracy."""

from __future__ import annotations

import base64
import csv
import io

import numpy as np
import pytest
from PIL import Image

from tove_jax.errors import InputError
from tove_jax.eval.tasks import mmbench

COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")


def picture(colour):
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), colour).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def table(path, rows, columns=COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    return path


RED, BLUE = picture("red"), picture("blue")
ROWS = [
    (7, "What is it?", 'A hint of\ntwo "lines"', "cat", "dog", "fish", "nan", "B", "object naming", RED),
    (8, "Which?", "nan", "one", "two", "", "", "A", "counting", BLUE),
]


@pytest.fixture
def path(tmp_path):
    return table(tmp_path / "mmbench.tsv", ROWS)


def test_rotations_are_made(path):
    pictures, questions = mmbench.read(path)
    assert [q.id for q in questions] == ["7", "1000007", "2000007", "8", "1000008"]
    assert [q.answers[0] for q in questions] == ["B", "A", "C", "A", "B"]
    assert [q.unit for q in questions] == ["7", "7", "7", "8", "8"]
    assert questions[0].prompt == (
        'A hint of\ntwo "lines"\nWhat is it?\nA. cat\nB. dog\nC. fish\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert questions[1].choices == ("dog", "fish", "cat")
    assert pictures.ids == ["7", "8"]
    np.testing.assert_array_equal(pictures[1].image[0, 0], [0, 0, 255])
    assert len(mmbench.read(path, rotate=False)[1]) == 2


def test_published_rotations_are_taken_as_they_are(tmp_path):
    rows = [*ROWS, (1000008, "Which?", "nan", "two", "one", "", "", "B", "counting", "8")]
    pictures, questions = mmbench.read(table(tmp_path / "m.tsv", rows))
    assert [q.id for q in questions] == ["7", "8", "1000008"]
    assert questions[2].pictures == questions[1].pictures and len(pictures) == 2


def test_all_rotations_must_be_right(path):
    _, questions = mmbench.read(path)
    found = mmbench.score(questions, ["B", "A.", "(C)", "A", "A"])
    assert found.metrics["accuracy"] == 0.5
    assert found.metrics["accuracy/object_naming"] == 1.0 and found.metrics["accuracy/counting"] == 0.0
    assert found.metrics["accuracy_plain"] == 1.0 and found.metrics["unclear"] == 0.0
    assert np.isnan(found.each["accuracy"]).sum() == 3
    assert mmbench.score(questions, ["dog", "dog", "dog", "?", "?"]).metrics["accuracy"] == 0.5


def test_secret_answers_are_read(tmp_path):
    columns = tuple(name for name in COLUMNS if name != "answer")
    rows = [tuple(value for name, value in zip(COLUMNS, row, strict=True) if name != "answer") for row in ROWS]
    assert all(q.answers == () for q in mmbench.read(table(tmp_path / "test.tsv", rows, columns))[1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((7, "?", "", "x", "", "", "", "A", "", RED), "question 7: expected choices"),
        ((7, "?", "", "x", "y", "", "", "C", "", RED), "field answer: expected a letter of 2 choices"),
        ((7, "?", "", "x", "y", "", "", "A", "", "99"), "expected a picture or the index of one, found '99'"),
        (("x", "?", "", "x", "y", "", "", "A", "", RED), "field index"),
        ((7, "?", "", "x", "y", "", "", "A", RED), "expected 10 fields, found 9"),
    ],
)
def test_damage_is_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        mmbench.read(table(tmp_path / "m.tsv", [row]))


def test_damaged_pictures_and_files(tmp_path):
    pictures, _ = mmbench.read(table(tmp_path / "m.tsv", [(*ROWS[0][:-1], "#" * 80)]))
    with pytest.raises(InputError, match="image of question 7: expected base64"):
        pictures[0]
    with pytest.raises(InputError, match="expected a column 'image'"):
        mmbench.read(table(tmp_path / "n.tsv", [], COLUMNS[:-1]))
    with pytest.raises(InputError, match="expected questions, found none"):
        mmbench.read(table(tmp_path / "o.tsv", []))
    (tmp_path / "p.tsv").write_text("\t".join(COLUMNS) + '\n7\t"never closed\n')
    with pytest.raises(InputError, match="not closed"):
        mmbench.read(tmp_path / "p.tsv")
