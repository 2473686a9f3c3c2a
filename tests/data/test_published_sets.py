"""Question and caption sets in their published layouts: records, prompts, conversations, refusals."""

from __future__ import annotations

import json

import pytest

from tove_jax.config.schema import DataConfig
from tove_jax.data import make_source
from tove_jax.data.coco import CocoSource
from tove_jax.data.dialogue import blank_picture
from tove_jax.data.picture import BLANK
from tove_jax.data.vqa import SETS, SHORT_ANSWER, VqaRecord, VqaSource, answer_of, prompt_of, read_records
from tove_jax.errors import InputError


def ten(*answers):
    """Returns answers as VQAv2 and VizWiz give them."""
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": n + 1} for n, answer in enumerate(answers)]


VQAV2 = {
    "info": {},
    "license": {},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 42, "question": "What is it?", "question_id": 42000},
        {"image_id": 42, "question": "Is it red?", "question_id": 42001},
    ],
}
VQAV2_ANSWERS = {
    "annotations": [
        {
            "question_type": "is it",
            "multiple_choice_answer": "no",
            "answers": ten("no", "yes", "no"),
            "image_id": 42,
            "answer_type": "yes/no",
            "question_id": 42001,
        },
        {
            "question_type": "what is",
            "multiple_choice_answer": "a cup",
            "answers": ten("cup", "a cup", "a cup"),
            "image_id": 42,
            "answer_type": "other",
            "question_id": 42000,
        },
    ]
}
GQA = {
    "0210": {
        "semantic": [],
        "question": "Who is wearing the dress?",
        "imageId": "2354786",
        "isBalanced": True,
        "answer": "woman",
        "fullAnswer": "The woman is wearing a dress.",
        "types": {"detailed": "relS", "semantic": "rel", "structural": "query"},
    },
    "0211": {"question": "Is it?", "imageId": "n161313", "isBalanced": True},
}
TEXTVQA = {
    "dataset_type": "val",
    "dataset_name": "textvqa",
    "data": [
        {
            "question": "what is the brand?",
            "image_id": "003a8ae2ef43b901",
            "image_classes": ["Cassette deck"],
            "answers": ["nous les gosses", "dakota", "dakota"],
            "question_tokens": ["what"],
            "question_id": 34602,
            "set_name": "val",
        }
    ],
}
VIZWIZ = [
    {
        "image": "VizWiz_val_00000000.jpg",
        "question": "Ok. There is another picture I hope it is a better one.",
        "answers": ten("unanswerable", "", "unsuitable", "unanswerable"),
        "answer_type": "unanswerable",
        "answerable": 0,
    }
]
POPE = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000000042.jpg",
        "text": "Is there a cup in the image?",
        "label": "yes",
    },
    {"question_id": 2, "image": "COCO_val2014_000000000042.jpg", "text": "Is there a car in the image?", "label": "no"},
]
VSR = [
    {
        "image": "000000050403.jpg",
        "image_link": "http://images.cocodataset.org/train2017/000000050403.jpg",
        "caption": "The teddy bear is in the person.",
        "label": 1,
        "relation": "in",
        "annotator_id": 31,
        "vote_true_validator_id": [2, 6],
        "vote_false_validator_id": [],
    },
    {"image": "000000050403.jpg", "caption": "The person is under the bear.", "label": 0, "relation": "under"},
]
SCIENCEQA = {
    "1": {
        "question": "Which is farthest north?",
        "choices": ["West Virginia", "Louisiana"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "subject": "social science",
        "split": "train",
    },
    "4": {
        "question": "Which kind?",
        "choices": ["a", "b", "c"],
        "answer": 2,
        "hint": "Read this.",
        "image": None,
        "subject": "language science",
        "split": "test",
    },
}
SPLITS = {"train": ["1"], "val": [], "test": ["4"], "minitest": ["4"]}
WRITTEN = {
    "vqav2": (VQAV2, "v2_OpenEnded_mscoco_val2014_questions.json"),
    "gqa": (GQA, "val_balanced_questions.json"),
    "textvqa": (TEXTVQA, "TextVQA_0.5.1_val.json"),
    "vizwiz": (VIZWIZ, "val.json"),
    "pope": (POPE, "coco_pope_random.json"),
    "vsr": (VSR, "dev.jsonl"),
    "scienceqa": (SCIENCEQA, "problems.json"),
}
LINES = ("pope", "vsr")


def write(folder, kind, content=None):
    default, name = WRITTEN[kind]
    content = default if content is None else content
    text = "\n".join(map(json.dumps, content)) + "\n" if kind in LINES else json.dumps(content)
    (folder / name).write_text(text)
    return folder / name


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def answers_of(folder, kind):
    content = {"vqav2": VQAV2_ANSWERS, "scienceqa": SPLITS}.get(kind)
    return "" if content is None else write_json(folder / f"{kind}-answers.json", content)


EXPECTED = {
    "vqav2": [
        VqaRecord("42000", "COCO_val2014_000000000042.jpg", "What is it?", ("cup", "a cup", "a cup"), group="other"),
        VqaRecord("42001", "COCO_val2014_000000000042.jpg", "Is it red?", ("no", "yes", "no"), group="yes/no"),
    ],
    "gqa": [
        VqaRecord("0210", "2354786.jpg", "Who is wearing the dress?", ("woman",), group="query"),
        VqaRecord("0211", "n161313.jpg", "Is it?"),
    ],
    "textvqa": [
        VqaRecord("34602", "003a8ae2ef43b901.jpg", "what is the brand?", ("nous les gosses", "dakota", "dakota"))
    ],
    "vizwiz": [
        VqaRecord(
            "VizWiz_val_00000000",
            "VizWiz_val_00000000.jpg",
            "Ok. There is another picture I hope it is a better one.",
            ("unanswerable", "", "unsuitable", "unanswerable"),
            group="unanswerable",
        )
    ],
    "pope": [
        VqaRecord(f"random:{row['question_id']}", row["image"], row["text"], (row["label"],), ("yes", "no"), "random")
        for row in POPE
    ],
    "vsr": [
        VqaRecord(
            str(number),
            row["image"],
            f"{row['caption']} Is this true of the picture?",
            (("no", "yes")[row["label"]],),
            ("yes", "no"),
            row["relation"],
        )
        for number, row in enumerate(VSR)
    ],
    "scienceqa": [
        VqaRecord(
            "1",
            "train/1/image.png",
            "Which is farthest north?",
            ("West Virginia",),
            ("West Virginia", "Louisiana"),
            "social science",
        ),
        VqaRecord("4", None, "Context: Read this.\nWhich kind?", ("c",), ("a", "b", "c"), "language science"),
    ],
}
ANSWERS = {
    "vqav2": ["a cup", "no"],
    "gqa": ["woman"],
    "textvqa": ["dakota"],
    "vizwiz": ["unanswerable"],
    "pope": ["yes", "no"],
    "vsr": ["yes", "no"],
    "scienceqa": ["A", "C"],
}


@pytest.mark.parametrize("kind", list(SETS))
def test_published_files_are_read(tmp_path, kind):
    records = read_records(kind, write(tmp_path, kind), annotations=answers_of(tmp_path, kind) or None)
    assert records == EXPECTED[kind]
    assert [answer_of(kind, record) for record in records if record.answers] == ANSWERS[kind]


def test_prompts_are_llavas(tmp_path):
    assert prompt_of("gqa", EXPECTED["gqa"][1]) == f"Is it?\n{SHORT_ANSWER}"
    assert prompt_of("gqa", EXPECTED["gqa"][1], request=False) == "Is it?"
    assert prompt_of("vizwiz", EXPECTED["vizwiz"][0]).splitlines()[1:] == [
        "When the provided information is insufficient, respond with 'Unanswerable'.",
        "Answer the question using a single word or phrase.",
    ]
    assert prompt_of("scienceqa", EXPECTED["scienceqa"][1]) == (
        "Context: Read this.\nWhich kind?\nA. a\nB. b\nC. c\n"
        "Answer with the option's letter from the given choices directly."
    )


@pytest.mark.parametrize("kind", list(SETS))
def test_a_set_trains(tmp_path, make_picture, check_source, kind):
    content = {"0210": GQA["0210"]} if kind == "gqa" else None
    path, answers = write(tmp_path, kind, content), answers_of(tmp_path, kind)
    names = list(dict.fromkeys(record.picture for record in EXPECTED[kind] if record.picture))
    if kind == "gqa":
        names = names[:1]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(make_picture())
    source = make_source(DataConfig(source=kind, path=str(path), annotations=str(answers), image_size=8))
    assert isinstance(source, VqaSource) and source.name == kind
    check_source(source)
    assert source.ids == names + [BLANK] * (kind == "scienceqa") and (blank_picture(source) == 1) == (
        kind == "scienceqa"
    )
    assert [one.turns[1]["value"] for one in source.dialogues] == ANSWERS[kind]
    for one, record in zip(source.dialogues, EXPECTED[kind], strict=False):
        assert one.id == record.id and len(one.pictures) == (record.picture is not None)
        assert one.turns[0]["value"] == "<image>\n" * len(one.pictures) + prompt_of(kind, record)


def test_some_parts_of_a_file(tmp_path):
    problems, splits = write(tmp_path, "scienceqa"), answers_of(tmp_path, "scienceqa")
    for part, wanted in (("test", ["4"]), ("train+minitest", ["1", "4"])):
        found = read_records("scienceqa", f"{problems}#{part}", annotations=splits)
        assert [record.id for record in found] == wanted
    assert [record.id for record in read_records("scienceqa", f"{problems}#train")] == ["1"]
    for name in ("popular", "adversarial"):
        (tmp_path / f"coco_pope_{name}.json").write_bytes(write(tmp_path, "pope").read_bytes())
    assert len(read_records("pope", tmp_path)) == 6
    found = read_records("pope", f"{tmp_path}#popular")
    assert [(record.id, record.group) for record in found] == [("popular:1", "popular"), ("popular:2", "popular")]


def test_2017s_names_and_secret_answers(tmp_path):
    file = {**VQAV2, "data_subtype": "test-dev2015"}
    records = read_records("vqav2", write(tmp_path, "vqav2", file))
    assert records[0].picture == "COCO_test2015_000000000042.jpg" and records[0].answers == ()
    with pytest.raises(InputError, match="vqav2: question '42000': expected an answer to learn"):
        VqaSource("vqav2", write(tmp_path, "vqav2", file), tmp_path)
    assert read_records("vqav2", write(tmp_path, "vqav2", {**VQAV2, "data_subtype": "train2017"}))[0].picture == (
        "000000000042.jpg"
    )


def changed(row, **fields):
    return {**row, **fields}


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("vqav2", {"questions": []}, "expected the fields questions, data_subtype, found questions"),
        ("vqav2", {**VQAV2, "questions": []}, "expected questions of vqav2, found none"),
        ("vqav2", {**VQAV2, "questions": VQAV2["questions"][:1] * 2}, "question 42000: expected each id once"),
        ("vqav2", {**VQAV2, "questions": [{"question_id": 7, "question": "?"}]}, "question 7: field image_id"),
        ("gqa", {"7": {"imageId": "1", "answer": "x"}}, "question 7: field question: expected text, found None"),
        ("gqa", {"7": changed(GQA["0210"], imageId="../1")}, "question 7: field image: expected a path inside"),
        ("gqa", [1], "expected a JSON object, found list"),
        ("textvqa", {"data": [changed(TEXTVQA["data"][0], answers=[])]}, "34602: field answers: expected a list"),
        ("vizwiz", [changed(VIZWIZ[0], image="")], "record 0: field image: expected text"),
        ("pope", [changed(POPE[0], label="maybe")], "line 1: field label: expected yes or no, found 'maybe'"),
        ("vsr", [changed(VSR[0], label="1")], "line 1: field label: expected 0 or 1, found '1'"),
        ("scienceqa", {"1": changed(SCIENCEQA["1"], answer=2)}, "problem 1: field answer: expected a number below 2"),
        ("scienceqa", {"1": changed(SCIENCEQA["1"], choices=["x"])}, "problem 1: field choices: expected two texts"),
    ],
)
def test_files_that_are_refused(tmp_path, kind, content, message):
    with pytest.raises(InputError, match=message):
        read_records(kind, write(tmp_path, kind, content))


def test_refusals_across_files(tmp_path):
    path = write(tmp_path, "vqav2")
    answers = write_json(tmp_path / "a.json", {"annotations": VQAV2_ANSWERS["annotations"][:1]})
    with pytest.raises(InputError, match="question 42000: expected its answers in .*a.json"):
        read_records("vqav2", path, annotations=answers)
    with pytest.raises(InputError, match="expected the splits train, val, test, minitest, found 'tset'"):
        read_records("scienceqa", f"{write(tmp_path, 'scienceqa')}#tset", annotations=answers_of(tmp_path, "scienceqa"))
    with pytest.raises(InputError, match="expected one of vqav2, .* found 'gqaa' .did you mean 'gqa'"):
        read_records("gqaa", path)
    with pytest.raises(InputError, match="absent.json cannot be read"):
        read_records("gqa", tmp_path / "absent.json")
    with pytest.raises(InputError, match=r"COCO_val2014_000000000042.jpg is missing \(1 missing of 1\)"):
        VqaSource("vqav2", path, tmp_path, answers_of(tmp_path, "vqav2"))
    with pytest.raises(InputError, match="data.annotations: the source folder takes none"):
        make_source(DataConfig(source="folder", path=str(tmp_path), annotations="x"))


COCO = {
    "info": {},
    "images": [
        {"license": 5, "file_name": "000000000002.jpg", "height": 10, "width": 12, "id": 2},
        {"license": 5, "file_name": "000000000001.jpg", "height": 10, "width": 12, "id": 1},
        {"license": 5, "file_name": "000000000003.jpg", "height": 10, "width": 12, "id": 3},
    ],
    "annotations": [
        {"image_id": 1, "id": 11, "caption": "A cup.\n"},
        {"image_id": 2, "id": 12, "caption": "A dog  runs."},
        {"image_id": 1, "id": 13, "caption": "One cup"},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000001.jpg",
            "imgid": 0,
            "split": "restval",
            "cocoid": 1,
            "sentids": [7, 8],
            "sentences": [
                {"tokens": ["a", "cup"], "raw": "A cup.", "imgid": 0, "sentid": 7},
                {"tokens": ["one"], "raw": "One", "imgid": 0, "sentid": 8},
            ],
        },
        {"filename": "2.jpg", "imgid": 1, "split": "test", "sentences": [{"raw": "A dog", "sentid": 9}]},
    ],
}


def test_coco_captions(tmp_path, make_picture, check_source):
    for name in ("1", "2"):
        (tmp_path / f"{name:0>12}.jpg").write_bytes(make_picture())
    path = write_json(tmp_path / "captions_train2017.json", COCO)
    source = make_source(DataConfig(source="coco", path=str(path), images=str(tmp_path)))
    check_source(source)
    assert source.ids == ["000000000002.jpg", "000000000001.jpg"]
    assert source.references == [("A dog runs.",), ("A cup.", "One cup")] and source.captions == [
        "A dog runs.",
        "A cup.",
    ]
    assert [(one.id, one.pictures) for one in source.dialogues] == [("12", (0,)), ("11", (1,)), ("13", (1,))]
    assert source.dialogues[2].turns[1]["value"] == "One cup"


def test_karpathys_split(tmp_path, make_picture, check_source):
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_val2014_000000000001.jpg").write_bytes(make_picture())
    path = write_json(tmp_path / "dataset_coco.json", KARPATHY)
    source = CocoSource(f"{path}#restval", tmp_path)
    check_source(source)
    assert source.ids == ["val2014/COCO_val2014_000000000001.jpg"] and source.references == [("A cup.", "One")]
    assert [one.id for one in source.dialogues] == ["7", "8"]
    with pytest.raises(InputError, match="2.jpg is missing"):
        CocoSource(path, tmp_path)
    with pytest.raises(InputError, match="expected parts among restval, test, found 'train'"):
        CocoSource(f"{path}#train", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**COCO, "annotations": [{"image_id": 9, "id": 1, "caption": "x"}]}, "image 9 has captions, but is not among"),
        ({**COCO, "annotations": [{"image_id": 1, "id": 5, "caption": " "}]}, "annotation 5: expected a caption"),
        ({**COCO, "annotations": []}, "expected captions, found none"),
        ({**COCO, "annotations": 3}, "field annotations: expected a list of objects, found int"),
        ({"annotations": []}, "expected the fields images"),
    ],
)
def test_caption_files_that_are_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        CocoSource(write_json(tmp_path / "c.json", content), tmp_path)
