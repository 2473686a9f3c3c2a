"""What a run with a language model shows: a tiny run's page, the table over several, and invented answers."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.report.test_page import read, words_of
from tove_jax.cli.main import main
from tove_jax.config import from_file
from tove_jax.errors import InputError
from tove_jax.eval.ask_tasks import Model, ask_tasks
from tove_jax.eval.tasks.base import Question
from tove_jax.experts.run import extract_all
from tove_jax.report import asked, looks, page
from tove_jax.report.collect import collect
from tove_jax.report.make import make_report
from tove_jax.train.checkpoint import load_settings
from tove_jax.train.loop import train

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 60, 200)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps that learns to name colours, and its settings."""
    folder = tmp_path_factory.mktemp("talking")
    (folder / "pictures").mkdir()
    records = []
    for number in range(16):
        colour = list(COLOURS)[number % 3]
        Image.new("RGB", (32, 32), COLOURS[colour]).save(folder / "pictures" / f"{number:02d}.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour is it?"}, {"from": "gpt", "value": colour}]
        records.append({"id": f"q{number}", "image": f"{number:02d}.png", "conversations": turns})
    (folder / "questions.json").write_text(json.dumps(records))
    words = {
        "title": "talking", "data.source": "llava", "data.path": folder / "questions.json",
        "data.images": folder / "pictures", "data.limit": 0, "data.held_out": 0.4, "data.flip": False,
        "student.image_size": 32, "features.experts": "('clip',)", "features.standardize": "none",
        "method.teacher_prior": "()", "language.kind": "llava", "language.width": 16, "language.layers": 1,
        "language.heads": 2, "language.kv_heads": 2, "language.mlp_width": 24, "language.vocabulary": 300,
        "text.template": "mistral_instruct", "text.limit": 112, "text.buckets": "(112,)", "train.steps": 2,
        "train.batch": 4, "train.log_every": 1, "train.checkpoint_every": 2, "optim.groups": "(('.*',1.0),)",
    }  # fmt: skip
    config = from_file(str(ROOT / "configs/demo.py:smoke"), [f"--config.{key}={value}" for key, value in words.items()])
    workdir = folder / "run"
    extract_all(config, workdir, progress=False)
    assert train(config, workdir, progress=False, devices=jax.devices()[:1]) == 0
    return workdir


def test_a_runs_page_asks_it_about_what_it_held_out(run):
    text = make_report(run, pictures=1).read_text()
    words = words_of(text)
    assert "A language model of 1 layers and width 16 reads its tokens." in words
    assert "What does it answer?" in words and "No task was answered yet." in words
    assert "2 held-out pictures" in words and words.count("Which colour is it?") == 2
    cards = cards_of(text)
    # An answer of nothing has no map.
    assert cards.count("<img") == 4 - cards.count("(nothing)")
    assert "Next tokens told" in words and "Text loss" in words and "padding" in words


def cards_of(text):
    return text[text.index('<ul class="asked">') : text.index('<section id="training"')]


def test_answers_that_are_kept_are_shown_with_their_maps(run):
    ask_tasks(Model(str(run)), [f"held_out={run}"], resamples=10)
    path = run / "eval" / "held_out.jsonl"
    head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    told = [one["right"][0].title() + "." if number % 2 else "purple" for number, one in enumerate(lines)]
    kept = [
        {**one, "answer": answer, "score": float(answer != "purple")} for one, answer in zip(lines, told, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *kept)))
    config, _ = load_settings(run)
    found = looks.make_asked(config, run, 9)
    assert len(found) == len({one.id for one in found}) == 6
    assert [one.answer for one in found] == told and [one.correct for one in found] == 3 * [False, True]
    for one in found:
        assert one.question == "Which colour is it?" and one.image.shape == (192, 192, 3)
        assert one.image.std(axis=(0, 1)).max() == 0 and one.look.shape == one.image.shape and one.look.std() > 0
        assert 0 < one.chance < 1
    text = page.render(collect(run, asked=found))
    words, cards = words_of(text), cards_of(text)
    assert "No task was answered yet." not in words and "held_out" in words and "6 questions." in words
    assert cards.count("<img") == 12 and cards.count("purple</b>") == 3
    assert cards.count("Right: ") == cards.count("✗") == cards.count('class="wrong"') == cards.count("✓") == 3
    assert "No picture was asked about." in page.render(collect(run))


def test_questions_are_chosen_evenly_and_by_turns():
    questions = [
        Question(f"{picture}:{group}", (picture,), "?", ("a",), group=group)
        for picture in range(30)
        for group in ("kind", "colour", "is_kind")
    ]
    questions += [Question("two", (1, 2), "?", ("a",)), Question("none", (), "?", ("a",))]
    chosen = looks.choose_questions(questions, 4)
    assert [one.pictures[0] for one in chosen] == [0, 10, 19, 29]
    assert [one.group for one in chosen] == ["kind", "colour", "is_kind", "kind"]
    assert looks.choose_questions(questions, 0) == [] and len(looks.choose_questions(questions, 99)) == 30


def test_several_runs_side_by_side(tmp_path, capsys):
    for name, share in (("start", 0.4), ("both", 0.8)):
        lines = [{"task": "held_out", "settings": {"model": name}}]
        for number in range(40):
            lines += [
                {"id": f"{number}:{group}", "answer": "red", "asked": "", "prompt": f"{group}?", "pictures": [str(number)],
                 "group": group, "right": ["red" if number % 10 < 10 * share else "blue"],
                 "score": float(number % 10 < 10 * share)}
                for group in ("colour", "is_colour")
            ]  # fmt: skip
        (tmp_path / name / "eval").mkdir(parents=True)
        (tmp_path / name / "eval" / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", "--answers", str(tmp_path / "start"), str(tmp_path / "both")]) == 0
    printed = capsys.readouterr().out
    assert "both − start" in printed and "+40.0 (" in printed and "is colour" in printed
    assert (tmp_path / "answers_held_out.md").read_text() == printed
    assert len(json.loads((tmp_path / "answers_held_out.json").read_text())["runs"]) == 2
    drawing = (tmp_path / "answers_held_out.svg").read_text()
    read(drawing)
    # Two names above the bars, and three clusters of two.
    assert drawing.count("<rect") == 1 + 2 + 6 and "<script" not in drawing
    assert main(["report", "--answers", str(tmp_path / "none"), "--workdir", str(tmp_path / "new")]) == 2
    assert "tove eval --tasks held_out=" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_foreign_answers_stay_text_and_points_stay_points(fabricated):
    image = np.zeros((192, 192, 3), np.uint8)
    one = asked.Asked("<id>", "<b>what?</b>", "</p>", "<script>alert(1)</script>", False, image)
    tasks = (
        asked.TaskScores(
            "mme", 2, (asked.Score("points/perception", 1234.5), asked.Score("accuracy", 0.5, 0.25, 0.75))
        ),
        asked.TaskScores("many", 9, tuple(asked.Score(f"accuracy/{n}", n / 99, 0.0, 1.0, 0.5) for n in range(60))),
    )
    shown = page.render(
        dataclasses.replace(fabricated[1], asked=(one, dataclasses.replace(one, answer="")), tasks=tasks)
    )
    assert "<script" not in shown and "<b>what" not in shown
    words = words_of(shown)
    assert "1234.5" in words and "25.0 to 75.0" in words and "36 more metrics are in eval/many.json" in words
    assert "(nothing)" in words and "0 answers are right" in words and 'href="#answers"' in shown
    assert 'id="answers"' not in page.render(fabricated[1])


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "predictions.json").write_text("[]")
    assert asked.read_scores(tmp_path) == ()
    (tmp_path / "eval" / "pope.json").write_text("{")
    with pytest.raises(InputError, match="pope.json: expected JSON"):
        asked.read_scores(tmp_path)
