"""Tokens that the decoder with cross-attention writes about pictures equal transformers'; answers are ranked."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.roberta_models import PICTURES, PICTURES_MASK, VOCABULARY, build, reference
from tove_jax.errors import InputError
from tove_jax.language.decode import Decoding
from tove_jax.language.generate import generate, pad_rows, rank

RNG = np.random.RandomState(5)
PROMPTS = [[0, *RNG.randint(3, VOCABULARY, length)] for length in (6, 3, 8, 1)]
TOKENS, MASK = pad_rows(PROMPTS, pad=1)
SEEN = {"pictures": PICTURES, "pictures_mask": PICTURES_MASK}
SIZE = 9
CASES = {
    "greedy": {"ends": (12,)},
    "greedy, at least 4": {"min_tokens": 4, "ends": (0, 12)},
    "beam": {"beams": 3, "ends": (12, 16)},
    "beam, at least 5": {"beams": 3, "min_tokens": 5, "length_penalty": 0.0, "ends": (0, 7, 12)},
}


def decoding_of(options):
    return Decoding(**{"new_tokens": SIZE, "ends": (2,), "pad": 1, **options})


def their_tokens(options):
    """Tokens, and with beams scores, that transformers writes; positions as RoBERTa counts them."""
    import torch

    decoding = decoding_of(options)
    mask = torch.tensor(MASK).long()
    found = reference(eos_token_id=list(decoding.ends)).generate(
        torch.tensor(TOKENS, dtype=torch.long),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0) + 2,
        encoder_hidden_states=torch.tensor(PICTURES),
        encoder_attention_mask=torch.tensor(PICTURES_MASK).long(),
        max_new_tokens=SIZE,
        min_new_tokens=decoding.min_tokens,
        do_sample=False,
        num_beams=decoding.beams,
        length_penalty=decoding.length_penalty,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens = found.sequences[:, TOKENS.shape[1] :].numpy()
    tokens = np.pad(tokens, ((0, 0), (0, SIZE - tokens.shape[1])), constant_values=1)
    return tokens, found.sequences_scores.numpy() if decoding.beams > 1 else None


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.mark.parametrize("case", list(CASES))
def test_equal_to_transformers(case, model, goldens):
    options = CASES[case]
    found = generate(*model, TOKENS, mask=MASK, **SEEN, decoding=decoding_of(options))
    kept = np.load(goldens / "language" / "generate_roberta.npz")
    np.testing.assert_array_equal(found.tokens, kept[case])
    lengths = np.asarray(found.lengths)
    assert (lengths > options.get("min_tokens", 0)).all()
    pytest.importorskip("torch")
    tokens, scores = their_tokens(options)
    np.testing.assert_array_equal(found.tokens, tokens)
    if scores is not None:
        np.testing.assert_allclose(found.scores, scores, rtol=1e-4)


def test_goldens_are_varied(goldens):
    """Some answers end early, and the least length and beams matter."""
    kept = np.load(goldens / "language" / "generate_roberta.npz")
    lengths = np.concatenate([(kept[case] != 1).sum(1) for case in CASES])
    assert lengths.min() <= 3 and lengths.max() == SIZE
    assert (kept["greedy"] != kept["beam"]).any()


def test_sampling_keeps_the_least_length(model):
    decoding = decoding_of({"sample": True, "temperature": 3.0, "min_tokens": 3, "ends": tuple(range(2, 12))})
    lengths = {
        int(length)
        for seed in range(4)
        for length in generate(*model, TOKENS, mask=MASK, **SEEN, decoding=decoding, key=jax.random.key(seed)).lengths
    }
    assert min(lengths) == 4 and len(lengths) > 1


def test_ranking_equals_scoring_whole_texts(model):
    """Each row's own pictures count, for every answer."""
    module, params = model
    answers = [[3, 4, 5, 2], [6, 2], [7, 8, 2]]
    ids, mask = pad_rows(answers, side="right")
    found = np.asarray(rank(module, params, ids, mask, TOKENS, mask=MASK, **SEEN))
    score = jax.jit(lambda params, text, seen: jax.nn.log_softmax(module.apply({"params": params}, text, **seen)[0]))
    for row, prompt in enumerate(PROMPTS[:2]):
        for column, answer in enumerate(answers):
            text = np.zeros((1, 12), int)  # nothing looks ahead, so one length serves all
            text[0, : len(prompt) + len(answer)] = prompt + answer
            told = np.asarray(score(params, text, {name: array[row : row + 1] for name, array in SEEN.items()}))[0]
            alone = sum(told[len(prompt) + n - 1, token] for n, token in enumerate(answer))
            np.testing.assert_allclose(found[row, column], alone, rtol=1e-4)
    chunks = rank(module, params, ids, mask, TOKENS, mask=MASK, **SEEN, chunk=2)
    np.testing.assert_allclose(chunks, found, rtol=1e-5)
    others = {name: array[::-1] for name, array in SEEN.items()}
    assert np.abs(found - rank(module, params, ids, mask, TOKENS, mask=MASK, **others)).max() > 0.1


def test_bad_input(model):
    module, params = model
    for arguments, message in (
        ({"pictures_mask": PICTURES_MASK}, "expected a language model with cross-attention, and tokens"),
        ({"pictures": PICTURES[:2]}, r"pictures: expected \(4"),
        ({"decoding": decoding_of({"new_tokens": 40})}, "at most 32 a row"),
    ):
        with pytest.raises(InputError, match=message):
            generate(module, params, TOKENS, mask=MASK, **{"decoding": decoding_of({}), **arguments})
    for least in (-1, SIZE + 1):
        with pytest.raises(InputError, match="min_tokens"):
            decoding_of({"min_tokens": least})


if __name__ == "__main__":
    from pathlib import Path

    np.savez_compressed(
        Path(__file__).parents[1] / "goldens" / "language" / "generate_roberta.npz",
        **{case: their_tokens(options)[0].astype(np.int8) for case, options in CASES.items()},
    )
