"""MME: the release folder and its points."""

from __future__ import annotations

import pytest
from PIL import Image

from tove_jax.errors import InputError
from tove_jax.eval.tasks import mme
from tove_jax.eval.tasks.base import Question


@pytest.fixture
def release(tmp_path):
    (tmp_path / "existence").mkdir()
    for folder in ("images", "questions_answers_YN"):
        (tmp_path / "artwork" / folder).mkdir(parents=True)
    for path in ("existence/01.png", "existence/02.jpg", "artwork/images/a.png"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / path)
    text = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
    for path in ("existence/01.txt", "existence/02.txt", "artwork/questions_answers_YN/a.txt"):
        (tmp_path / path).write_text(text)
    return tmp_path


def test_both_layouts_are_read(release):
    pictures, questions = mme.read(release)
    assert len(questions) == 6 and len(pictures) == 3
    assert questions[0].id == "artwork/a/0"
    assert questions[0].prompt == "Is it red?\nAnswer the question using a single word or phrase."
    assert [question.answers for question in questions[:2]] == [("yes",), ("no",)]
    assert pictures.ids[questions[-1].pictures[0]] == "existence/02.jpg"
    assert pictures[0].image.shape == (4, 4, 3)
    assert mme.read(release, own_request=True)[1][0].prompt == "Is it red? Please answer yes or no."


def test_points(release):
    _, questions = mme.read(release)
    # artwork: both right; existence: 01 both, 02 one of two.
    found = mme.score(questions, ["Yes", "No.", "yes, it is", "no", "No", "No"])
    assert found.metrics["points/artwork"] == 200.0
    assert found.metrics["points/existence"] == pytest.approx(100 * (3 / 4 + 1 / 2))
    assert found.metrics["points/perception"] == found.metrics["points/total"] == pytest.approx(325.0)
    assert found.metrics["points/cognition"] == 0.0
    assert found.metrics["accuracy"] == pytest.approx(5 / 6)
    assert found.metrics["accuracy_plus/existence"] == 0.5


@pytest.mark.parametrize(
    ("answer", "label"), [("Yes", "yes"), ("no way", "no"), (" No", "no"), ("I do not", "other"), ("", "other")]
)
def test_the_first_four_signs_decide(answer, label):
    assert mme.label_of(answer) == label


def test_a_category_of_cognition_adds_to_its_own_sum():
    questions = [Question(str(i), (0,), "?", ("yes",), group="code_reasoning", unit="u") for i in range(2)]
    assert mme.score(questions, ["yes", "yes"]).metrics["points/cognition"] == 200.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "existence/02.jpg").unlink(), "02.txt: expected a picture 02"),
        (lambda root: (root / "existence/01.txt").write_text("Is it?\tmaybe\n"), "01.txt, line 1: expected question"),
        (lambda root: (root / "existence/01.txt").write_text("Is it?\tyes\n"), "01.txt: expected two questions"),
    ],
)
def test_damage_is_named(release, change, message):
    change(release)
    with pytest.raises(InputError, match=message):
        mme.read(release)


def test_no_categories(tmp_path):
    with pytest.raises(InputError, match="expected folders such as existence"):
        mme.read(tmp_path)
    with pytest.raises(InputError, match="expected MME's folder"):
        mme.read(tmp_path / "none")
