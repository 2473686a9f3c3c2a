"""LLaVA folders that answer: ranks are the model's own log-likelihoods, with whole pictures and with tiles."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.llava_models import LLAVA, NEXT, draw_llava, write_llava
from tove_jax.data.conversation import IGNORED, encode, expand_images, get_template
from tove_jax.data.tokenizer import load_tokenizer, train_tokenizer
from tove_jax.errors import InputError
from tove_jax.eval.answerers import open_answerer
from tove_jax.hf import llava
from tove_jax.language.decode import Decoding

PICTURES = [
    np.random.default_rng(n).integers(0, 256, size, np.uint8) for n, size in enumerate(((20, 44, 3), (30, 11, 3)))
]


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def folder(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param)
    config = {"llava": LLAVA, "llava_next": NEXT}[request.param]
    config = {**config, "text_config": {**config["text_config"], "vocab_size": 300, "max_position_embeddings": 900}}
    write_llava(where / "model", config, draw_llava(config))
    train_tokenizer(["what is it", "it is a thing"], where / "tokenizer", size=300)
    for file in (where / "tokenizer").iterdir():
        shutil.copy(file, where / "model")
    return where / "model"


def test_ranks_are_the_models_log_likelihoods(folder):
    chat = open_answerer(folder)
    question, choices = "what is it", ["it is", "a thing, it is"]
    found = chat.rank([PICTURES, []], [question, question], [choices, choices[:1]])
    model, params, extras = llava.load(folder)
    tokenizer, index, limit = load_tokenizer(folder), None, None
    if model.anyres:
        sizes = [picture.shape[:2] for picture in PICTURES]
        counts, tiles = [extras.view.count(size) for size in sizes], sum(map(extras.view.tiles, sizes))
        index = jnp.asarray(extras.view.index(sizes, tiles=tiles, length=sum(counts)))[None]
        pixels = extras.view.view.normalize(extras.view.stack(PICTURES, tiles=tiles))
    else:
        counts = [model.tokens] * len(PICTURES)
        pixels = extras.view.normalize(np.stack([extras.view.cut(picture) for picture in PICTURES]))
    for place, choice in enumerate(choices):
        turns = [{"from": "human", "value": f"<image>\n<image>\n{question}"}, {"from": "gpt", "value": choice}]
        row = expand_images(encode(turns, get_template("v1"), tokenizer, images=2), counts, limit)
        logits = model.logits(params, jnp.asarray(pixels)[None], jnp.asarray(row.ids)[None], index=index)
        learned = np.flatnonzero(row.labels != IGNORED)
        told = jax.nn.log_softmax(logits[0, learned - 1])[np.arange(len(learned)), row.labels[learned]]
        np.testing.assert_allclose(found[0][place], told.sum(), rtol=1e-4)
    assert found[1].shape == (1,) and found[1][0] != found[0][0]


def test_answers_are_texts_and_runs_options_are_refused(folder):
    chat = open_answerer(folder)
    texts = chat.answer([PICTURES[:1], PICTURES], ["what is it", "what"], Decoding(4))
    assert texts == [chat.answer([shown], [text], Decoding(4))[0]
                     for shown, text in ((PICTURES[:1], "what is it"), (PICTURES, "what"))]  # fmt: skip
    with pytest.raises(InputError, match="--step and --experts are of runs"):
        open_answerer(folder, step=3)
