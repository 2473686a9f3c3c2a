"""Tasks as asked for on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.eval.answering import paint, write_pope
from tove_jax.errors import InputError
from tove_jax.eval.tasks import KINDS, Options, open_task, parse_wanted
from tove_jax.eval.tasks.base import Scores
from tove_jax.eval.tasks.registry import check_names


def test_a_task_names_its_files():
    wanted = parse_wanted("vqav2@val=q.json:val2014:a.json")
    assert (wanted.kind, wanted.name) == ("vqav2", "val")
    assert wanted.files.path == Path("q.json") and wanted.files.annotations == Path("a.json")
    assert parse_wanted("mme=MME").name == "mme" and parse_wanted("mme=MME").files.images is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pop=x", r"expected one of .*found 'pop' \(did you mean 'pope'\?\)"),
        ("pope", r"expected pope\[@NAME\]=QUESTIONS\[:PICTURES\[:ANSWERS\]\]"),
        ("pope=", "expected pope"),
        ("mme=a:b", r"expected mme\[@NAME\]=PATH"),
        ("pope@a/b=x", "expected a name of letters"),
        ("pope@knn=x", "no metric's own"),
    ],
)
def test_other_forms_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_wanted(text)


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(InputError, match="'pope' is given twice"):
        check_names([parse_wanted("pope=a"), parse_wanted("pope=b")])
    check_names([parse_wanted("pope=a"), parse_wanted("pope@second=b")])


def test_prompts(tmp_path):
    path = write_pope(tmp_path)
    task = open_task(parse_wanted(f"pope={path}"))
    assert task.questions[0].prompt == "Is it red?\nAnswer the question using a single word or phrase."
    plain = open_task(parse_wanted(f"pope={path}"), Options(prompts="plain"))
    assert plain.questions[0].prompt == "Is it red?"
    own = open_task(parse_wanted(f"pope={path}"), Options(prompts="Q: {question} A:"))
    assert own.questions[0].prompt == "Q: Is it red? A:"
    with pytest.raises(InputError, match="expected llava, plain or a text"):
        Options(prompts="lava")


def test_modes_and_what_they_need(tmp_path):
    path = write_pope(tmp_path)
    chosen = open_task(parse_wanted(f"pope={path}"), Options(choose=True))
    assert chosen.mode == "choose" and chosen.ranked(chosen.questions[0]) == ("yes", "no")
    (tmp_path / "gqa.json").write_text(json.dumps({"1": {"imageId": "0", "question": "What?", "answer": "cat"}}))
    (tmp_path / "0.png").rename(tmp_path / "0.jpg")
    with pytest.raises(InputError, match="question '1': expected choices to rank, found none"):
        open_task(parse_wanted(f"gqa={tmp_path / 'gqa.json'}"), Options(choose=True))
    (tmp_path / "answers.txt").write_text("cat\ndog\n")
    options = Options(candidates=str(tmp_path / "answers.txt"))
    task = open_task(parse_wanted(f"gqa={tmp_path / 'gqa.json'}"), options)
    assert task.mode == "choose" and task.questions[0].choices == ("cat", "dog")
    (tmp_path / "answers.txt").write_text("cat\ncat\n")
    with pytest.raises(InputError, match="two answers or more, each once"):
        open_task(parse_wanted(f"gqa={tmp_path / 'gqa.json'}"), options)


def test_scienceqa_ranks_letters(tmp_path):
    problem = {"question": "Which?", "choices": ["sun", "moon"], "answer": 1, "split": "test", "image": None}
    (tmp_path / "problems.json").write_text(json.dumps({"5": problem}))
    task = open_task(parse_wanted(f"scienceqa={tmp_path / 'problems.json'}"), Options(choose=True))
    question = task.questions[0]
    assert task.ranked(question) == ("A", "B") and question.pictures == ()
    assert question.prompt == (
        "Which?\nA. sun\nB. moon\nAnswer with the option's letter from the given choices directly."
    )
    assert task.score(task.questions, ["B"]).metrics["accuracy"] == 1.0


def test_a_missing_picture_is_named(tmp_path):
    path = write_pope(tmp_path)
    (tmp_path / "3.png").unlink()
    with pytest.raises(InputError, match=r"3\.png is missing \(1 missing of 6\)"):
        open_task(parse_wanted(f"pope={path}"))


def test_every_task_says_what_stands_for_it(tmp_path):
    paint(tmp_path / "red")
    assert all(kind.main for kind in KINDS.values())
    assert Scores({}, {}).metrics == {}
    paint(tmp_path / "blue")
    task = open_task(parse_wanted(f"zeroshot={tmp_path}"), Options(class_text="{} paint"))
    assert task.mode == "rank" and task.questions[0].choices == ("blue paint", "red paint")
