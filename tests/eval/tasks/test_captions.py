"""Captions as words, their scores, and ranked captions and classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tove_jax.errors import InputError
from tove_jax.eval.tasks import caption_scores, captions
from tove_jax.eval.tasks.base import Question
from tove_jax.eval.tasks.caption_words import split_words

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens/eval/captions.json").read_text())
DIFFERENT = {
    "#1 & @home a*b=c+d",
    "o'clock rock'n'roll y'all ma'am d'you",
    "+1 555-1234 (555) 123-4567",
    "lbs. oz. ft. in. min. sec. hr.",
    "a...b",
    "a....b",
    "a!b",
    "me@you",
    "**",
    "non-u.s.",
}
"""What docs/evaluation.md names."""


def test_words_are_those_of_the_published_tokenizer():
    different = {text for text, words in GOLDEN["words"] if " ".join(split_words(text)) != words}
    assert len(GOLDEN["words"]) > 300
    assert different == DIFFERENT


def test_scores_are_those_of_the_published_scorers():
    questions = [Question(str(i), (0,), "", tuple(told)) for i, (_, told) in enumerate(GOLDEN["captions"])]
    found = captions.score_captions(questions, [said for said, _ in GOLDEN["captions"]])
    np.testing.assert_allclose(found.each["cider"], GOLDEN["cider"], atol=2e-9)
    np.testing.assert_allclose(found.each["rouge_l"], GOLDEN["rouge_l"], atol=2e-9)
    np.testing.assert_allclose([found.metrics[f"bleu_{n}"] for n in (1, 2, 3, 4)], GOLDEN["bleu"], atol=2e-9)
    assert found.metrics["cider"] == pytest.approx(np.mean(GOLDEN["cider"]))


@pytest.mark.goldens
def test_the_published_scorers_say_so_again():
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    texts = [text for said, told in GOLDEN["captions"] for text in (said, *told)]
    words = {text: " ".join(split_words(text)) for text in texts}
    given = {i: [words[text] for text in told] for i, (_, told) in enumerate(GOLDEN["captions"])}
    said = {i: [words[one]] for i, (one, _) in enumerate(GOLDEN["captions"])}
    np.testing.assert_allclose(cider.Cider().compute_score(given, said)[1], GOLDEN["cider"], atol=2e-9)
    np.testing.assert_allclose(rouge.Rouge().compute_score(given, said)[1], GOLDEN["rouge_l"], atol=2e-9)
    np.testing.assert_allclose(bleu.Bleu(4).compute_score(given, said, verbose=0)[0], GOLDEN["bleu"], atol=2e-9)
    if shutil.which("java"):
        tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
        found = tokenizer.tokenize({i: [{"caption": text}] for i, (text, _) in enumerate(GOLDEN["words"])})
        assert [found[i][0] for i in range(len(found))] == [words for _, words in GOLDEN["words"]]


def test_extremes():
    words = [["a", "red", "dog", "runs", "fast"], ["two", "cats", "sit", "over", "there"]]
    references = [[one] for one in words]
    assert caption_scores.cider(words, references) == pytest.approx([10.0, 10.0])
    assert caption_scores.bleu(words, references)[0] == pytest.approx(np.ones(4))
    assert caption_scores.rouge_l(words, references) == pytest.approx([1.0, 1.0])
    nothing = [[], ["zebra"]]
    assert caption_scores.cider(nothing, references) == pytest.approx([0.0, 0.0])
    assert caption_scores.rouge_l(nothing, references) == pytest.approx([0.0, 0.0])
    assert caption_scores.bleu(nothing, references)[0] == pytest.approx(np.zeros(4), abs=1e-3)


@pytest.fixture
def coco(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    file = {
        "images": [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("abc")],
        "annotations": [
            {"id": 10, "image_id": 0, "caption": "a cat"},
            {"id": 11, "image_id": 0, "caption": "the cat"},
            {"id": 12, "image_id": 1, "caption": "a dog"},
            {"id": 13, "image_id": 2, "caption": "a bus"},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(file))
    return tmp_path


def test_captions_are_read_from_files_and_folders(coco, tmp_path_factory):
    source, references = captions.open_captions(coco / "captions.json", None)
    questions = captions.caption_questions(source, references, "Say.")
    assert [q.answers for q in questions] == [("a cat", "the cat"), ("a dog",), ("a bus",)]
    assert questions[1].id == "b.jpg" and source[1].image.shape == (4, 4, 3)
    folder = tmp_path_factory.mktemp("folder")
    Image.new("RGB", (4, 4)).save(folder / "x.png")
    with pytest.raises(InputError, match="expected a caption for each of 1 pictures, found 0"):
        captions.open_captions(folder, None)
    (folder / "captions.txt").write_text("x.png\ta plane\n")
    assert captions.open_captions(folder, None)[1] == [("a plane",)]


def test_retrieval_in_both_directions(coco):
    questions = captions.retrieval_questions(*captions.open_captions(coco / "captions.json", None), "")
    assert questions[0].choices == ("a cat", "the cat", "a dog", "a bus")
    told = np.log(
        [
            [0.40, 0.10, 0.30, 0.20],  # own: the first two
            [0.50, 0.05, 0.40, 0.05],  # own: the third, liked less than the ever popular first one
            [0.10, 0.10, 0.10, 0.70],
        ]
    )
    found = captions.score_retrieval(questions, list(told))
    assert found.metrics["text/recall@1"] == pytest.approx(2 / 3)
    assert found.metrics["text_debiased/recall@1"] == 1.0
    assert found.metrics["text/recall@5"] == 1.0
    # "a cat" is likelier after the second picture than after its own; "the cat" after both cats and buses alike.
    assert found.metrics["picture/recall@1"] == pytest.approx(2 / 4)
    assert found.metrics["picture/recall@5"] == 1.0
    with pytest.raises(InputError, match="expected each picture's choices"):
        captions.score_retrieval(questions[:2], list(told[:2]))
    part = captions.among_themselves(questions[:2])
    assert captions.score_retrieval(part, list(told[:2, :3])).metrics["text/recall@1"] == 0.5


def test_classes(tmp_path):
    for name in ("cat", "guide_dog", "bus"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    from tove_jax.data.folder import FolderSource

    questions = captions.class_questions(FolderSource(tmp_path), "What?", "a {}.")
    assert questions[0].choices == ("a bus.", "a cat.", "a guide dog.")
    assert [q.answers[0] for q in questions] == ["a bus.", "a cat.", "a guide dog."]
    told = np.log([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.45, 0.45]])
    found = captions.score_classes(questions, list(told))
    assert found.metrics["accuracy"] == pytest.approx(1 / 3)  # equal likelihoods are wrong
    assert found.metrics["accuracy/bus"] == 1.0 and found.metrics["accuracy_class_mean"] == pytest.approx(1 / 3)
    assert found.metrics["accuracy_top5"] == 1.0
    assert found.metrics["accuracy_debiased"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="expected a place"):
        captions.class_questions(FolderSource(tmp_path), "", "a thing")
    with pytest.raises(InputError, match="two labels or more"):
        captions.class_questions(FolderSource(tmp_path), "", "{}", [0])
