"""Conversations as ids and labels: LLaVA's golden cases exactly, every template's mask in words, every refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tove_jax.data.conversation import (
    IGNORED,
    IMAGE_ID,
    TEMPLATES,
    check_tokenizer,
    encode,
    encode_prompt,
    expand_images,
    get_template,
    without_pictures,
)
from tove_jax.data.tokenizer import load_tokenizer, train_tokenizer
from tove_jax.errors import InputError

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = json.loads((GOLDENS / "llava_labels.json").read_text("utf-8"))["cases"]
QUESTION, ANSWER = {"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "Two cups."}
LATER = [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "Red."}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The tokenizer of the golden cases, cut down to their pieces."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.json").write_bytes((GOLDENS / "llava_labels_tokenizer.json").read_bytes())
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    texts = [template.system for template in TEMPLATES.values()] + ["How many? Two cups.\nWhat colour? Red."] * 2
    return train_tokenizer(texts, tmp_path_factory.mktemp("small") / "tokenizer", size=400)


def learned(row, tokenizer):
    """Returns the learned tokens' text, runs parted by a bar."""
    runs, inside = [], False
    for id, label in zip(row.ids, row.labels, strict=True):
        if label != IGNORED:
            runs = runs if inside else [*runs, []]
            runs[-1].append(int(id))
        inside = label != IGNORED
    return "|".join(tokenizer.inner.decode(run) for run in runs)


@pytest.mark.parametrize("case", CASES, ids=[f"{case['template']}-{case['name']}" for case in CASES])
def test_golden_cases_of_llava(llama, case):
    row = encode(case["conversation"], get_template(case["template"]), llama, images=int(case["has_image"]), limit=2048)
    assert row.ids.tolist() == case["input_ids"]
    assert row.labels.tolist() == case["labels"]
    assert row.ids.dtype == row.labels.dtype == np.int32
    assert row.ignored is case["mismatch_warning"] and row.truncated == 0
    assert row.starts.tolist() == [place for place, id in enumerate(case["input_ids"]) if id == IMAGE_ID]


@pytest.mark.parametrize("limit", [1, 35, 40, 55])
def test_truncation_keeps_the_golden_beginning(llama, limit):
    case = next(case for case in CASES if case["template"] == "v1" and case["name"] == "three_turns")
    row = encode(case["conversation"], get_template("v1"), llama, images=1, limit=limit)
    assert row.ids.tolist() == case["input_ids"][:limit]
    assert row.labels.tolist() == case["labels"][:limit]
    assert row.truncated == len(case["input_ids"]) - limit
    assert len(row.starts) == case["input_ids"][:limit].count(IMAGE_ID)


WORDS = {
    "plain": "Two cups.\n",
    "v1": "Two cups.</s>|Red.</s>",
    "llava_llama_2": "Two cups. </s>|Red. </s>",
    "llama_2": "Two cups. </s>|Red. </s>",
    "mistral_instruct": "Two cups. </s>|Red. </s>",
    "chatml": "Two cups.<|im_end|>|Red.<|im_end|>",
    "mpt": "Two cups.<|im_end|>|Red.<|im_end|>",
    "chatml_direct": "Two cups.<|im_end|>|Red.<|im_end|>",
    "caption": "Two cups.</s>",
    "vqa": "Two cups.</s>|Red.</s>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_learns_answers_and_their_end(small, name):
    template = get_template(name)
    check_tokenizer(template, small)
    turns = [QUESTION, ANSWER] + ([] if template.pictures_only else LATER)
    row = encode(turns, template, small, images=1)
    assert learned(row, small).replace("| ", "|").removeprefix(" ") == WORDS[name]
    prompt = encode_prompt(turns[:-1], template, small, images=1)
    # The learned space after the prompt belongs to the answer; what stands before it is the prompt.
    last = np.flatnonzero(np.diff(np.concatenate([[0], row.labels != IGNORED])) == 1)[-1]
    np.testing.assert_array_equal(prompt, row.ids[:last])


@pytest.fixture(scope="module")
def bytes_of_words(tmp_path_factory):
    """A tokenizer as RoBERTa's: byte-level pairs, spaces before words, offsets without them."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(["A picture of two cups. How many? What colour? red"] * 3, trainer)
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)
    return load_tokenizer(folder)


def test_pictures_beside_the_text(bytes_of_words):
    """ToVE's templates: the prefix is not learned, pictures leave no trace, prompts end where answers begin."""
    tokenizer, pictured = bytes_of_words, {"from": "human", "value": "<image>\nHow many?"}
    row = without_pictures(encode([pictured, ANSWER], get_template("caption"), tokenizer, images=1))
    assert tokenizer.inner.decode(row.ids) == "<s>A picture of Two cups.</s>" and row.ids[[0, -1]].tolist() == [0, 2]
    assert learned(row, tokenizer) == " Two cups.</s>"
    prompt = encode_prompt([pictured], get_template("caption"), tokenizer, images=1)
    assert tokenizer.inner.decode(prompt[prompt >= 0]) == "<s>A picture of"
    row = without_pictures(encode([pictured, ANSWER, *LATER], get_template("vqa"), tokenizer, images=1))
    assert tokenizer.inner.decode(row.ids) == "<s>How many? Two cups.</s>What colour? Red.</s>"
    assert learned(row, tokenizer) == " Two cups.</s>| Red.</s>" and not len(row.starts)
    prompt = encode_prompt([pictured], get_template("vqa"), tokenizer, images=1)
    assert prompt.tolist() == [0, IMAGE_ID, *tokenizer.split("How many?")[0]]


def test_chatml_in_full(small):
    row = encode([QUESTION, ANSWER, *LATER], get_template("chatml"), small, images=1)
    texts = [small.inner.decode(part) for part in np.split(row.ids, row.starts) for part in [part[part >= 0]]]
    assert texts == [
        "<s><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "\nHow many?<|im_end|>\n<|im_start|>assistant\nTwo cups.<|im_end|>\n"
        "<|im_start|>user\nWhat colour?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n",
    ]
    other = dataclasses.replace(get_template("v1"), system="")
    assert small.inner.decode(encode(LATER, other, small).ids) == "<s> USER: What colour? ASSISTANT: Red.</s>"


def test_pictures_keep_llavas_places(small):
    first = encode([{"from": "human", "value": "How <image> many?"}, ANSWER], get_template("v1"), small, images=1)
    moved = encode([{"from": "human", "value": "<image>\nHow  many?"}, ANSWER], get_template("v1"), small, images=1)
    np.testing.assert_array_equal(first.ids, moved.ids)
    two = encode(
        [{"from": "human", "value": "What <image> and <image>?"}, ANSWER, QUESTION, ANSWER],
        get_template("v1"),
        small,
        images=3,
    )
    between = two.ids[two.starts[0] + 1 : two.starts[1]]
    assert small.text(between).strip() == "and" and len(two.starts) == 3
    both = encode([{"from": "human", "value": "<image><image>"}, ANSWER], get_template("plain"), small, images=2)
    assert both.starts.tolist() == [1, 2] and both.labels[:3].tolist() == [IGNORED] * 3


@pytest.mark.parametrize(
    "turns",
    [
        [QUESTION, {"from": "gpt", "value": "a</s>b"}],
        [QUESTION, ANSWER, {"from": "human", "value": "ASSISTANT: what?"}, ANSWER],
        [QUESTION, ANSWER, LATER[0]],
        [QUESTION, {"from": "gpt", "value": "the token <unk>"}],
    ],
    ids=["end", "marker", "unanswered", "padding"],
)
def test_what_llava_cannot_divide_is_not_learned(small, turns):
    row = encode(turns, get_template("v1"), small, images=1)
    assert row.ignored and set(row.labels.tolist()) == {IGNORED}
    # Beyond the limit LLaVA does not look.
    start = len(encode([QUESTION, ANSWER], get_template("v1"), small, images=1))
    if len(turns) > 2:
        row = encode(turns, get_template("v1"), small, images=1, limit=start)
        assert not row.ignored and learned(row, small).strip() == "Two cups.</s>"


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        ([QUESTION, ANSWER], 0, "image token without image: expected 0 <image> for 0 pictures, found 1"),
        (LATER, 1, "image without image token: expected 1 <image> for 1 pictures, found 0"),
        ([{"from": "user", "value": "x"}, ANSWER], 0, "turn 0: unknown role: expected 'human' or 'gpt', found 'user'"),
        ([QUESTION, {"from": "gpt", "value": " \n"}], 1, "turn 1: empty answer"),
        ([{"from": "human", "value": ""}, ANSWER], 0, "turn 0: empty question"),
        ([LATER[0], {"from": "gpt", "value": "<image>"}], 1, "turn 1: expected <image> in questions alone"),
        ([LATER[0], LATER[0], ANSWER], 0, "found two of 'human' in a row"),
        ([LATER[0]], 0, "expected a question and its answer, found 1 turns"),
        ([ANSWER], 0, "expected a question and its answer, found 0 turns"),
    ],
)
def test_refusals_name_the_record(small, turns, images, message):
    with pytest.raises(InputError, match="record 7: .*") as error:
        encode(turns, get_template("v1"), small, images=images, where="record 7")
    assert message in str(error.value)


def test_refusals_of_templates(small, llama):
    with pytest.raises(InputError, match="expected one of plain, v1.*did you mean 'chatml'"):
        get_template("chatm")
    with pytest.raises(InputError, match=r"'plain': expected a picture and its caption, found 0 pictures and 2 turns"):
        encode(LATER, get_template("plain"), small)
    with pytest.raises(InputError, match=r"'plain'.*found 1 pictures and 4 turns"):
        encode([QUESTION, ANSWER, *LATER], get_template("plain"), small, images=1)
    with pytest.raises(InputError, match=r"template 'chatml': .*the token '<\|im_start\|>'"):
        check_tokenizer(get_template("chatml"), llama)
    with pytest.raises(InputError, match="a question as the last turn"):
        encode_prompt(LATER, get_template("v1"), small)


def test_placeholders_become_the_pictures_tokens(small):
    turns = [{"from": "human", "value": "What <image> and <image>?"}, ANSWER]
    row = encode(turns, get_template("v1"), small, images=2)
    wide = expand_images(row, [3, 2])
    first, second = row.starts
    assert wide.starts.tolist() == [first, second + 2] and len(wide) == len(row) + 3
    assert (wide.ids[first : first + 3] == IMAGE_ID).all() and (wide.ids == IMAGE_ID).sum() == 5
    np.testing.assert_array_equal(wide.ids[wide.ids >= 0], row.ids[row.ids >= 0])
    np.testing.assert_array_equal(wide.labels[wide.labels >= 0], row.labels[row.labels >= 0])
    assert (wide.labels[wide.ids == IMAGE_ID] == IGNORED).all()
    # The limit may cut a picture, as LLaVA's does; a picture cut whole is not counted.
    cut = expand_images(row, [3, 2], limit=int(second) + 3)
    np.testing.assert_array_equal(cut.ids, wide.ids[: second + 3])
    assert len(cut.starts) == 2 and cut.truncated == len(wide) - second - 3
    assert expand_images(row, [3, 2], limit=int(first)).starts.tolist() == []
    for wrong in ([3], [3, 0]):
        with pytest.raises(InputError, match="a positive number of tokens for each of 2 pictures"):
            expand_images(row, wrong)
