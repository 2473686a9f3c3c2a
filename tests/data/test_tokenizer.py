"""Tokenizers: trained, read from SentencePiece models, wrapped, refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from pathlib import Path

import pytest

from tests.goldens.llava_labels import VOCABULARY, reduce_vocabulary
from tove_jax.data.tokenizer import SPECIAL, load_tokenizer, train_tokenizer, wrap_tokenizer
from tove_jax.errors import InputError

TEXTS = ["a red car on a road", "a blue car on a hill", "the red hill"] * 3


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("small") / "tokenizer", size=320)


def field(number, value):
    """Returns one field of a protocol buffer."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    return bytes([number << 3 | 2, len(value)]) + value


def write_model(folder, pieces, kind=2, **settings):
    """Writes a SentencePiece model of (piece, score, type), and its settings."""
    folder.mkdir()
    rows = [field(1, piece.encode()) + field(2, float(score)) + field(3, type) for piece, score, type in pieces]
    data = b"".join(field(1, row) for row in rows) + field(2, field(3, kind))
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "text", ["a red car", " a  red\ncar ", "", "  ", "Grüße 停車 🚫", "a\tb\r\n", "<|im_start|>a</s>"]
)
def test_texts_come_back(small, text):
    ids, spans = small.split(text)
    assert small.inner.decode(ids) == text
    assert len(spans) == len(ids) and (spans[:, 0] <= spans[:, 1]).all()
    if text:
        assert spans[:, 1].max() == len(text)


def test_training_is_deterministic_and_small(small, tmp_path):
    again = train_tokenizer(iter(TEXTS), tmp_path / "again", size=320)
    files = [Path(folder) / "tokenizer.json" for folder in (small.name, again.name)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [small.token(token) for token in SPECIAL] == [0, 1, 2, 3, 4] and 261 < len(small) <= 320
    assert (small.begin, small.end, small.pad) == (1, 2, 0)
    ids, _ = small.split("a red car")
    assert len(ids) < len("a red car") and small.text([1, -200, *ids, 2]) == "a red car"


def test_a_sentencepiece_model_goes_by_scores(tmp_path):
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0, 6) for byte in range(256)]
    pieces += [("▁▁", -1e9, 1), ("bc", -2, 1), ("ab", -1, 1), ("▁a", -3, 1), ("▁", -1e9, 1)]
    pieces += [(letter, -9, 1) for letter in "abc"]
    first = {piece: id for id, (piece, *_) in enumerate(pieces)}

    def split(tokenizer, text):
        ids, spans = tokenizer.split(text)
        return [pieces[id][0] for id in ids], spans.tolist()

    new = load_tokenizer(write_model(tmp_path / "new", pieces, legacy=False, pad_token="<unk>"))
    # "ab" outscores "bc" though its id is larger; a space joins "a" before it joins another space.
    assert split(new, "abc")[0] == ["▁", "ab", "c"]
    assert split(new, "b  a")[0] == ["▁", "b", "▁", "▁a"]
    # A space is put before a text that has one, but not after a special token.
    assert split(new, "  b") == (["▁▁", "▁", "b"], [[0, 1], [1, 2], [2, 3]])
    assert split(new, "b</s>b")[0] == ["▁", "b", "</s>", "b"]
    assert split(new, "bé")[0] == ["▁", "b", "<0xC3>", "<0xA9>"]
    assert (new.begin, new.end, new.pad) == (1, 2, 0) and new.token("</s>") == first["</s>"]
    old = load_tokenizer(write_model(tmp_path / "old", pieces))
    assert split(old, "b</s>b")[0] == ["▁", "b", "</s>", "▁", "b"]


def test_refusals(small, tmp_path):
    with pytest.raises(InputError, match="expected a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="the token '<image>', found"):
        small.token("<image>")
    with pytest.raises(InputError, match="it exists"):
        train_tokenizer(TEXTS, tmp_path)
    for texts, size in ((TEXTS, 261), ([""], 400)):
        with pytest.raises(InputError, match="expected texts and a size above 261"):
            train_tokenizer(texts, tmp_path / "none", size=size)
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="expected a fast tokenizer"):
        wrap_tokenizer(object(), "slow")
    unigram = write_model(tmp_path / "unigram", [("a", 0, 1)], kind=1)
    with pytest.raises(InputError, match="of byte-pair encoding, found kind 1"):
        load_tokenizer(unigram)
    path = unigram / "tokenizer.model"
    for broken in (path.read_bytes()[:-1], b"\x00\x01\xff", b"<html>"):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="expected a SentencePiece model"):
            load_tokenizer(unigram)


def test_a_tokenizer_without_an_end_is_refused(small):
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=small.inner.backend_tokenizer)
    with pytest.raises(InputError, match="endless: expected a tokenizer with an end token"):
        wrap_tokenizer(endless, "endless")
    gpt = PreTrainedTokenizerFast(tokenizer_object=small.inner.backend_tokenizer, bos_token="</s>", eos_token="</s>")
    assert wrap_tokenizer(gpt, "gpt").begin is None and wrap_tokenizer(gpt, "gpt").pad == 2


@pytest.mark.goldens
def test_the_golden_vocabulary_is_a_part_of_the_published_one(tmp_path):
    found = importlib.util.find_spec("mistral_common")
    if found is None:
        pytest.skip("needs the package mistral-common (install it with --no-deps)")
    shutil.copy(Path(found.origin).parent / "data" / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false, "pad_token": "<unk>"}')
    assert reduce_vocabulary(tmp_path) == json.loads(VOCABULARY.read_text("utf-8"))
