"""Where a model looked: against differences of its own ranking, and where it cannot look."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.config.schema import LanguageConfig
from tove_jax.data.conversation import IMAGE_ID, get_template
from tove_jax.data.tokenizer import load_tokenizer, train_tokenizer
from tove_jax.errors import InputError
from tove_jax.language.chat import Chat
from tove_jax.language.model import LanguageModel
from tove_jax.language.saliency import look
from tove_jax.models.llama import Llama
from tove_jax.models.projector import Projector
from tove_jax.models.roberta import Roberta

WIDTH, SIDE = 8, 2
REACH = 0.02
PICTURES = [np.full((4, 4, 3), (value, 0, 1), np.uint8) for value in (10, 90)]
PROMPT, ANSWER = "What is this?", "a red thing"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    train_tokenizer(["What is this? a red thing, a blue thing", "yes no"], folder, size=300)
    return load_tokenizer(folder)


def see(pictures):
    """Tokens by a rule: the first pixel's red says which, its green and blue which channel is moved a little."""
    found = []
    for picture in pictures:
        kind, place, sign = (int(value) for value in picture[0, 0])
        tokens = np.random.default_rng(kind).normal(size=SIDE**2 * WIDTH)
        tokens[place] += REACH * (sign - 1)
        found.append(tokens.reshape(-1, WIDTH).astype(np.float32))
    return found


def picture(kind, place=0, sign=1):
    return np.full((4, 4, 3), (kind, place, sign), np.uint8)


def make(kind, tokenizer, change=None, **options):
    """A chat of random weights, of one layer."""
    config = LanguageConfig(kind=kind, width=WIDTH)
    shape = {"vocabulary": len(tokenizer), "width": WIDTH, "depth": 1, "heads": 2, "mlp_width": 12, **options}
    if kind == "llava":
        decoder, more = Llama(kv_heads=2, head_width=4, **shape), {}
        model = LanguageModel(config, decoder, Projector(WIDTH, "linear", jnp.float32))
    else:
        decoder, more = Roberta(picture_width=WIDTH, **shape), {"pictures": jnp.zeros((1, 1, WIDTH))}
        model = LanguageModel(config, decoder, None)
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), ids, **more)["params"])
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        flat = np.ones(leaf.shape) if "scale" in str(path) else rng.normal(scale=0.3, size=leaf.shape)
        return jnp.asarray(0 * flat if change and change(str(path)) else flat, jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return Chat(model, {"model": params}, tokenizer, get_template("mistral_instruct"), see, 128)


@pytest.fixture(scope="module")
def llava(tokenizer):
    return make("llava", tokenizer)


@pytest.mark.parametrize("kind", ["llava", "tove"])
def test_a_map_is_the_likelihoods_gradient_times_the_tokens(kind, llava, tokenizer):
    chat = llava if kind == "llava" else make(kind, tokenizer)
    (found,) = look(chat, [PICTURES[:1]], [PROMPT], [ANSWER])
    (maps,) = found.maps
    assert maps.shape == (SIDE, SIDE) and maps.dtype == np.float32 and maps.sum() == pytest.approx(1, abs=1e-6)
    # The model's own ranking, with each channel of each token moved up and down.
    moved = [[picture(10, place, sign)] for place in range(SIDE**2 * WIDTH) for sign in (2, 0)]
    told = chat.rank([PICTURES[:1], *moved], [PROMPT] * (1 + len(moved)), [[ANSWER]] * (1 + len(moved)))
    assert found.log_likelihood == pytest.approx(float(told[0][0]), rel=1e-4)
    slopes = np.diff(np.array(told[1:], np.float64).reshape(-1, 2)[:, ::-1], axis=1)[:, 0] / (2 * REACH)
    amounts = np.abs(slopes * see(PICTURES[:1])[0].ravel()).reshape(-1, WIDTH).sum(axis=1)
    np.testing.assert_allclose(maps.ravel(), amounts / amounts.sum(), atol=0.01)
    assert maps.std() > 0.02


def test_answers_do_not_depend_on_their_neighbours(llava):
    chat = llava
    shown = [PICTURES[:1], PICTURES, PICTURES[1:], PICTURES[:1], PICTURES[1:]]
    prompts = [PROMPT, "Alike?", PROMPT, "Is this a red thing, or a blue thing?", PROMPT]
    answers = ["yes", "no", "a blue thing", "a red thing", "yes"]
    together = look(chat, shown, prompts, answers)
    assert [len(one.maps) for one in together] == [1, 2, 1, 1, 1]
    for place in (0, 1, 4):
        (alone,) = look(chat, shown[place : place + 1], prompts[place : place + 1], answers[place : place + 1])
        np.testing.assert_allclose(np.stack(alone.maps), np.stack(together[place].maps), atol=1e-5)
        assert alone.log_likelihood == pytest.approx(together[place].log_likelihood, rel=1e-4)
    assert sum(float(one.sum()) for one in together[1].maps) == pytest.approx(1, abs=1e-6)
    assert look(chat, [], [], []) == []


def test_what_the_answer_cannot_see_gets_nothing(llava, tokenizer):
    # Of one layer with a window, the answer's places see the last words alone; cut off, no picture is seen at all.
    detached = {"llava": lambda path: "'attention'" in path and "'out'" in path, "tove": lambda path: "'cross'" in path}
    for chat in (make("llava", tokenizer, window=4), *(make(kind, tokenizer, cut) for kind, cut in detached.items())):
        (found,) = look(chat, [PICTURES[:1]], [PROMPT], ["yes"])
        assert not found.maps[0].any() and np.isfinite(found.log_likelihood)
    # A window that ends in the middle of the picture, seen from the first place that tells of the answer.
    row = llava.placed(llava.divided(PROMPT, 1, ["yes"])[0], llava.tokens(PICTURES[:1]))
    window = len(row) - int(np.argmax(row == IMAGE_ID)) - SIDE
    (found,) = look(make("llava", tokenizer, window=window), [PICTURES[:1]], [PROMPT], ["yes"])
    assert (found.maps[0] > 0).tolist() == [[False, False], [True, True]]


def test_what_cannot_be_asked_is_refused(llava):
    chat = llava
    for arguments, message in (
        (([PICTURES[:1]], [PROMPT], []), "expected pictures and an answer for each of 1 prompts, found 1 and 0"),
        (([[]], [PROMPT], [ANSWER]), "expected a picture with each prompt"),
        (([PICTURES[:1]], [PROMPT], [""]), "choice ''"),
        (([PICTURES[:1]], [PROMPT * 40], [ANSWER]), "expected at most 128 tokens with the answer"),
    ):
        with pytest.raises(InputError, match=message):
            look(chat, *arguments)
    odd = dataclasses.replace(chat, see=lambda pictures: [np.zeros((3, WIDTH), np.float32)] * len(pictures))
    with pytest.raises(InputError, match="square grid, found 3 tokens"):
        look(odd, [PICTURES[:1]], [PROMPT], [ANSWER])
