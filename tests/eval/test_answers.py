"""Answers that are kept, gone on with, divided and scored."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.eval.answering import ColourAnswerer, paint, write_pope
from tove_jax.errors import InputError
from tove_jax.eval import answers
from tove_jax.eval.tasks import Options, open_task, parse_wanted
from tove_jax.language.answer import Answerer
from tove_jax.language.decode import Decoding


@pytest.fixture
def task(tmp_path):
    return open_task(parse_wanted(f"pope={write_pope(tmp_path / 'pope')}"))


def evaluate(task, workdir, answerer=None, **more):
    return answers.evaluate_answers(
        task,
        answerer or ColourAnswerer(),
        workdir,
        **{"batch": 5, "progress": False, "model": "m", "resamples": 0, **more},
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_is_answered_scored_and_kept(task, tmp_path):
    (tmp_path / "metrics.json").write_text('{"eval/knn/student": 0.5, "eval/pope/stale": 1.0, "train/x": 2}')
    model = ColourAnswerer()
    assert isinstance(model, Answerer)
    result = evaluate(task, tmp_path, model, resamples=50)
    assert result.metrics["accuracy"] == 1.0 and result.questions == 12
    assert (result.metrics["accuracy_low"], result.metrics["accuracy_high"]) == (1.0, 1.0)
    assert model.sizes == [5, 5, 5]  # the last batch is filled up
    header, *rows = lines(tmp_path / "eval/pope.jsonl")
    assert header["settings"]["model"] == "m" and header["settings"]["new_tokens"] == 128
    assert [row["id"] for row in rows] == [question.id for question in task.questions]
    assert rows[0]["answer"] == "yes" and rows[0]["right"] == ["yes"] and rows[0]["pictures"] == ["0.png"]
    assert rows[0]["group"] == "random" and "Is it red?" in rows[0]["prompt"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval/knn/student"] == 0.5 and metrics["train/x"] == 2 and "eval/pope/stale" not in metrics
    assert metrics["eval/pope/f1_mean"] == 1.0 and metrics["eval/pope/questions"] == 12
    assert json.loads((tmp_path / "eval/pope.json").read_text())["metrics"]["accuracy"] == 1.0


def test_an_interval_counts_pictures_and_not_questions(tmp_path):
    task = open_task(parse_wanted(f"pope={write_pope(tmp_path / 'pope', 3)}"))

    class Half(ColourAnswerer):
        def answer(self, pictures, prompts, decoding):
            # All questions about red pictures are wrong.
            return ["maybe" if self._name(p) == "red" else a for p, a in zip(pictures, super().answer(
                pictures, prompts, decoding), strict=True)]  # fmt: skip

    found = evaluate(task, tmp_path, Half(), resamples=200).metrics
    assert found["accuracy"] == pytest.approx(5 / 6)  # "maybe" has no no: POPE reads a yes
    values, one = np.array([1, 0, 1, 1, 1, 1.0]), np.array([0, 0, 1, 1, 2, 2])
    from tove_jax.eval.bootstrap import bootstrap_clusters, bootstrap_mean

    assert found["accuracy_std"] == pytest.approx(bootstrap_clusters(values, one, 200).std)
    both = np.repeat([0.0, 1.0, 1.0, 0.0], 2)
    pairs = bootstrap_clusters(both, np.repeat(np.arange(4), 2), 800).std
    assert pairs == pytest.approx(np.sqrt(2) * bootstrap_mean(both, 800).std, rel=0.1)


def test_what_is_answered_is_not_asked_again(task, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(task, tmp_path, ColourAnswerer(stop_after=1))
    assert len(lines(tmp_path / "eval/pope.jsonl")) == 1 + 5
    model = ColourAnswerer()
    whole = evaluate(task, tmp_path, model)
    assert sum(model.sizes) == 10 and len(set(model.prompts)) <= 7
    fresh = evaluate(task, tmp_path / "other")
    assert whole.metrics == fresh.metrics
    assert (tmp_path / "eval/pope.jsonl").read_bytes() == (tmp_path / "other/eval/pope.jsonl").read_bytes()
    again = ColourAnswerer()
    assert evaluate(task, tmp_path, again).metrics == fresh.metrics and again.calls == 0
    evaluate(task, tmp_path, again, overwrite=True)
    assert again.calls == 3


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_line_that_was_cut_off_is_answered_again(task, tmp_path, cut):
    with pytest.raises(KeyboardInterrupt):
        evaluate(task, tmp_path, ColourAnswerer(stop_after=2))
    path = tmp_path / "eval/pope.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    evaluate(task, tmp_path)
    evaluate(task, tmp_path / "other")
    assert path.read_bytes() == (tmp_path / "other/eval/pope.jsonl").read_bytes()


_CHILD = """
import sys, time
from pathlib import Path
from tests.eval.answering import ColourAnswerer
from tove_jax.eval.answers import evaluate_answers
from tove_jax.eval.tasks import open_task, parse_wanted

class Slow(ColourAnswerer):
    def answer(self, *all):
        time.sleep(0.02)
        return super().answer(*all)

task = open_task(parse_wanted(f"pope={sys.argv[1]}"))
print("ready", flush=True)
evaluate_answers(task, Slow(), sys.argv[2], batch=1, progress=False, model="m")
"""


def test_a_killed_process_loses_nothing_that_was_answered(task, tmp_path):
    path = tmp_path / "eval/pope.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path / "pope/coco_pope_random.json"), str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        child.stdout.readline()
        until = time.monotonic() + 30
        while time.monotonic() < until and (not path.exists() or path.read_bytes().count(b"\n") < 4):
            time.sleep(0.005)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    answered = path.read_bytes().count(b"\n") - 1
    assert 3 <= answered < 12
    model = ColourAnswerer()
    evaluate(task, tmp_path, model, batch=1)
    assert model.calls == 12 - answered
    evaluate(task, tmp_path / "other")
    assert path.read_bytes() == (tmp_path / "other/eval/pope.jsonl").read_bytes()


def test_two_processes_find_what_one_does(task, tmp_path):
    alone = evaluate(task, tmp_path / "alone")
    both = tmp_path / "both"
    first = evaluate(task, both, process_index=0, process_count=2)
    assert first is None  # the other's answers are missing
    assert evaluate(task, both, process_index=1, process_count=2) is None
    model = ColourAnswerer()
    found = evaluate(task, both, model, process_index=0, process_count=2)
    assert model.calls == 0 and found.metrics == alone.metrics
    assert (both / "eval/pope.jsonl").read_bytes() == (tmp_path / "alone/eval/pope.jsonl").read_bytes()
    assert [path.name for path in (both / "eval").iterdir() if "part" in path.name] == []


def test_another_number_of_processes_goes_on(task, tmp_path):
    evaluate(task, tmp_path, process_index=1, process_count=3)
    model = ColourAnswerer()
    assert evaluate(task, tmp_path, model, batch=1).metrics["accuracy"] == 1.0
    assert model.calls == 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "other"}, "settings.model: the answers there are of 'm', expected 'other'"),
        ({"decoding": Decoding(new_tokens=9)}, "settings.new_tokens: the answers there are of 128, expected 9"),
    ],
)
def test_answers_of_other_settings_are_not_mixed(task, tmp_path, more, message):
    evaluate(task, tmp_path)
    with pytest.raises(InputError, match=message):
        evaluate(task, tmp_path, **more)
    assert evaluate(task, tmp_path, **more, overwrite=True).metrics["accuracy"] == 1.0


def test_other_questions_of_the_same_ids_are_refused(task, tmp_path):
    evaluate(task, tmp_path)
    other = open_task(parse_wanted(f"pope={tmp_path / 'pope/coco_pope_random.json'}"), Options(prompts="plain"))
    with pytest.raises(InputError, match="line 2: field asked: question 'random:1' was another one"):
        evaluate(other, tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2: expected JSON"), ('{"id": "random:1"}', "line 2: field answer"), ("[]", "expected an object")],
)
def test_damaged_lines_are_named(task, tmp_path, line, message):
    evaluate(task, tmp_path)
    path = tmp_path / "eval/pope.jsonl"
    header, _, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header, line, *rest]) + "\n")
    with pytest.raises(InputError, match=message):
        evaluate(task, tmp_path)


def test_a_limit_is_spread_and_may_grow(task, tmp_path):
    few = evaluate(task, tmp_path, limit=4)
    assert few.questions == 4
    ids = [row["id"] for row in lines(tmp_path / "eval/pope.jsonl")[1:]]
    assert ids == [task.questions[place].id for place in (0, 3, 6, 9)]
    model = ColourAnswerer()
    assert evaluate(task, tmp_path, model, batch=1).questions == 12 and model.calls == 8
    assert evaluate(task, tmp_path, model, limit=4).questions == 4
    assert len(lines(tmp_path / "eval/pope.jsonl")) == 13  # what was answered before stays


def test_choices_are_ranked_in_batches(tmp_path):
    path = write_pope(tmp_path / "pope")
    task = open_task(parse_wanted(f"pope={path}"), Options(choose=True))
    model = ColourAnswerer()
    result = evaluate(task, tmp_path, model, batch=5)
    assert max(model.sizes) == 2  # two choices each
    assert result.metrics["yes_share"] == 0.0  # neither has a colour, "no" is the shorter one


def test_long_lists_of_choices_are_cut(tmp_path):
    for name in ("red", "green", "blue"):
        paint(tmp_path / "classes" / name, 1)
    for name, number in (("green", 1), ("blue", 2)):
        paint(tmp_path / "new", 3)
        (tmp_path / "new" / f"{number}.png").replace(tmp_path / "classes" / name / "0.png")
    task = open_task(parse_wanted(f"zeroshot={tmp_path / 'classes'}"))
    whole = evaluate(task, tmp_path / "a", batch=3)
    model = ColourAnswerer()
    assert evaluate(task, tmp_path / "b", model, batch=2).metrics == whole.metrics
    assert model.calls == 6 and whole.metrics["accuracy"] == 1.0
    assert "scores" in lines(tmp_path / "b/eval/zeroshot.jsonl")[1]


def test_secret_answers_are_still_given(tmp_path):
    paint(tmp_path)
    (tmp_path / "gqa.json").write_text(json.dumps({"1": {"imageId": "0", "question": "What colour?"}}))
    (tmp_path / "0.png").rename(tmp_path / "0.jpg")
    task = open_task(parse_wanted(f"gqa={tmp_path / 'gqa.json'}"))

    class Any(ColourAnswerer):
        def _name(self, pictures):
            return "half \ud83d of a pair"

    result = evaluate(task, tmp_path, Any())
    assert result.metrics == {} and "secret" in answers.table([result])
    assert lines(tmp_path / "eval/gqa.jsonl")[1]["answer"] == "half \ud83d of a pair"
    assert evaluate(task, tmp_path, ColourAnswerer(stop_after=0)).questions == 1


def test_a_model_that_answers_too_little_is_named(task, tmp_path):
    class Few(ColourAnswerer):
        def answer(self, pictures, prompts, decoding):
            return ["yes"]

    with pytest.raises(InputError, match="pope: expected 5 answers of the model, found 1"):
        evaluate(task, tmp_path, Few())

    class Lost(ColourAnswerer):
        def rank(self, pictures, prompts, choices, mean=False):
            return [np.full(len(told), np.nan) for told in choices]

    chosen = open_task(parse_wanted(f"pope={tmp_path / 'pope/coco_pope_random.json'}"), Options(choose=True))
    with pytest.raises(InputError, match="expected 2 finite log-likelihoods"):
        evaluate(chosen, tmp_path / "x", Lost())
    with pytest.raises(InputError, match="found 0, 0 and 0"):
        evaluate(task, tmp_path, batch=0)


def test_a_damaged_picture_is_named_and_the_rest_is_kept(task, tmp_path):
    (tmp_path / "pope/5.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"5\.png"):
        evaluate(task, tmp_path, batch=2)
    assert len(lines(tmp_path / "eval/pope.jsonl")) == 1 + 10


def test_the_table(task, tmp_path):
    found = answers.table([evaluate(task, tmp_path, resamples=50)]).splitlines()
    assert found[0].split("|")[1:4] == [" task ", " metric    ", " value "]
    assert found[2].split() == ["|", "pope", "|", "f1_mean", "|", "100.0", "|", "|", "12", "|"]
    assert any("accuracy" in line and "100.0 to 100.0" in line for line in found)
    assert not any("random" in line for line in found)  # the only category
    write_pope(tmp_path / "pope", kind="popular")
    both = open_task(parse_wanted(f"pope@both={tmp_path / 'pope'}"))
    assert any("f1/popular" in line for line in answers.table([evaluate(both, tmp_path)]).splitlines())
