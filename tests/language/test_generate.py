"""Generated tokens equal transformers', by its numbers in a file and by the library itself; ranking equals scoring."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.language_models import CONFIGS, VOCABULARY, draw, reference
from tove_jax.errors import InputError
from tove_jax.hf import llama as hf
from tove_jax.hf.rules import flatten, to_tree
from tove_jax.language.decode import Decoding
from tove_jax.language.generate import generate, pad_rows, rank
from tove_jax.models.llama import abstract_params

RNG = np.random.RandomState(2)
PROMPTS = [RNG.randint(3, VOCABULARY, length).tolist() for length in (7, 3, 9, 1)]
TOKENS, MASK = pad_rows(PROMPTS, pad=1)
SIZE = 10
# Every kind of model and of search, each once with each: (model, options).
CASES = {
    "llama/greedy": ("llama", {}),
    "mistral/greedy": ("mistral", {}),
    "qwen2/greedy": ("qwen2", {}),
    "llama/beam": ("llama3", {"beams": 3}),
    "mistral/beam": ("mistral", {"beams": 4, "length_penalty": 2.0, "early_stopping": "never"}),
    "qwen2/beam": ("qwen2", {"beams": 3, "length_penalty": -1.0, "early_stopping": True, "ends": (2, 5)}),
}


def build(name):
    module = hf.from_config(CONFIGS[name])
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(module)).items()}
    return module, jax.tree.map(jnp.asarray, to_tree(draw(CONFIGS[name]), hf.table(), shapes))


def decoding_of(options):
    return Decoding(**{"new_tokens": SIZE, "ends": (2,), "pad": 1, **options})


def their_tokens(name, options):
    """Tokens, and with beams scores, that transformers writes."""
    import torch

    decoding = decoding_of(options)
    model = reference(
        CONFIGS[name], draw(CONFIGS[name]), pad_token_id=1, bos_token_id=0, eos_token_id=list(decoding.ends)
    )
    found = model.generate(
        torch.tensor(TOKENS, dtype=torch.long),
        attention_mask=torch.tensor(MASK).long(),
        max_new_tokens=SIZE,
        do_sample=False,
        num_beams=decoding.beams,
        length_penalty=decoding.length_penalty,
        early_stopping=decoding.early_stopping,
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens = found.sequences[:, TOKENS.shape[1] :].numpy()
    tokens = np.pad(tokens, ((0, 0), (0, SIZE - tokens.shape[1])), constant_values=1)
    return tokens, found.sequences_scores.numpy() if decoding.beams > 1 else None


@pytest.mark.parametrize("case", list(CASES))
def test_equal_to_transformers(case, goldens):
    name, options = CASES[case]
    module, params = build(name)
    found = generate(module, params, TOKENS, mask=MASK, decoding=decoding_of(options))
    kept = np.load(goldens / "language" / "generate.npz")
    np.testing.assert_array_equal(found.tokens, kept[case])
    pytest.importorskip("torch")
    tokens, scores = their_tokens(name, options)
    np.testing.assert_array_equal(found.tokens, tokens)
    if scores is not None:
        np.testing.assert_allclose(found.scores, scores, rtol=1e-4)


def test_goldens_are_varied(goldens):
    """Answers end early and late, and beams find others than the greedy search."""
    kept = np.load(goldens / "language" / "generate.npz")
    lengths = np.concatenate([(kept[case] != 1).sum(1) for case in CASES])
    assert (
        lengths.min() < SIZE // 2
        and lengths.max() == SIZE
        and len({row.tobytes() for row in kept["llama/greedy"]}) == 4
    )


@pytest.fixture(scope="module")
def model():
    return build("mistral")


def test_embeddings_rows_and_keys(model):
    """Embeddings in place of tokens, a row alone, more padding: the same text; sampling follows its key."""
    module, params = model
    decoding = decoding_of({})
    both = generate(module, params, TOKENS, mask=MASK, decoding=decoding)
    embedded = module.apply({"params": params}, TOKENS, method="embed")
    again = generate(module, params, embeddings=embedded, mask=MASK, decoding=decoding)
    np.testing.assert_array_equal(both.tokens, again.tokens)
    wider = pad_rows(PROMPTS, pad=4, multiple=8)
    assert wider[0].shape == (4, 16)
    again = generate(module, params, wider[0], mask=wider[1], decoding=decoding)
    np.testing.assert_array_equal(both.tokens, again.tokens)
    np.testing.assert_allclose(both.scores, again.scores, atol=1e-4)
    sampling = decoding_of({"sample": True, "temperature": 2.0, "top_p": 0.9})
    one, same, other = (
        np.asarray(generate(module, params, TOKENS, mask=MASK, decoding=sampling, key=jax.random.key(seed)).tokens)
        for seed in (0, 0, 1)
    )
    assert (one == same).all() and (one != other).any()


def test_ranking_equals_scoring_whole_texts(model):
    module, params = model
    answers = [[3, 4, 5], [6], [7, 8], [3, 4, 2]]
    ids, mask = pad_rows(answers, side="right")
    found = np.asarray(rank(module, params, ids, mask, TOKENS, mask=MASK))
    score = jax.jit(lambda params, tokens: jax.nn.log_softmax(module.apply({"params": params}, tokens)[0]))
    for row, prompt in enumerate(PROMPTS[:2]):
        for column, answer in enumerate(answers):
            text = np.zeros((1, 12), int)  # nothing looks ahead, so one length serves all
            text[0, : len(prompt) + len(answer)] = prompt + answer
            told = np.asarray(score(params, text))[0]
            alone = sum(told[len(prompt) + n - 1, token] for n, token in enumerate(answer))
            np.testing.assert_allclose(found[row, column], alone, rtol=1e-4)
    mean = rank(module, params, np.stack([ids] * 4), np.stack([mask] * 4), TOKENS, mask=MASK, mean=True)
    np.testing.assert_allclose(mean, found / mask.sum(1), rtol=1e-5)


def test_bad_input(model):
    module, params = model
    decoding = decoding_of({})
    cases = (
        ({}, "either tokens or embeddings"),
        ({"tokens": TOKENS + VOCABULARY}, "beyond the vocabulary"),
        ({"tokens": TOKENS - 3}, "token -2"),
        ({"tokens": TOKENS[0]}, "expected tokens"),
        ({"tokens": TOKENS * 1.0}, "expected integers"),
        ({"tokens": TOKENS, "mask": MASK[:, ::-1]}, "padding on the left"),
        ({"tokens": TOKENS, "mask": MASK[:2]}, "mask: expected"),
        ({"tokens": TOKENS, "decoding": decoding_of({"ends": (99,)})}, "99 is beyond"),
        ({"tokens": TOKENS, "decoding": decoding_of({"sample": True})}, "random key"),
    )
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            generate(module, params, **{"decoding": decoding, **arguments})
    for rows in ([], [[1], []]):
        with pytest.raises(InputError, match="at least one"):
            pad_rows(rows)
    ids, mask = pad_rows([[3, 4], [5]], side="left")
    with pytest.raises(InputError, match="padding on the right"):
        rank(module, params, ids, mask, TOKENS, mask=MASK)
    with pytest.raises(InputError, match="answers: expected"):
        rank(module, params, ids[None], mask[None], TOKENS, mask=MASK)


if __name__ == "__main__":
    from pathlib import Path

    np.savez_compressed(
        Path(__file__).parents[1] / "goldens" / "language" / "generate.npz",
        **{case: their_tokens(*arguments)[0].astype(np.int8) for case, arguments in CASES.items()},
    )
