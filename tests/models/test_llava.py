"""LLaVA-1.5 and LLaVA-NeXT: logits, gradients and tokens are transformers'; pictures land where they belong."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.llava_models import (
    IMAGE_TOKEN,
    LLAVA,
    NEXT,
    SIZES,
    described,
    draw_llava,
    in_memory,
    reference_llava,
    rows,
    their_ids,
    tree_of,
)
from tove_jax.data.anyres import Anyres
from tove_jax.data.conversation import IMAGE_ID
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.hf.rules import flatten
from tove_jax.language.decode import Decoding
from tove_jax.language.generate import generate
from tove_jax.models.llava import Llava, logical_axes, pack_pictures, place_pictures
from tove_jax.models.projector import Projector
from tove_jax.parallel import logical_specs

GOLDEN = Path(__file__).parent.parent / "goldens" / "language" / "llava_tiny.npz"
ANYRES = Anyres(View(8), 2, tuple((high, wide) for high, wide in NEXT["image_grid_pinpoints"]))
OPTIONS = {
    "llava": LLAVA,
    "full": {**LLAVA, "vision_feature_select_strategy": "full", "vision_feature_layer": [0, -1, 2],
             "multimodal_projector_bias": False},
    "linear": {**LLAVA, "projector_hidden_act": "linear", "text_config": {**LLAVA["text_config"], "tie_word_embeddings": True}},
}  # fmt: skip


@functools.cache
def case(name):
    """A model with its parameters, and a batch: two pictures, none, one; (ours, transformers' pixels)."""
    config = NEXT if name == "next" else OPTIONS[name]
    found = described(config)
    weights = draw_llava(config)
    random = np.random.RandomState(5)
    if name == "next":
        sizes = [SIZES[:2], (), SIZES[2:3], SIZES[3:]]
        counts = [[ANYRES.count(size) for size in row] for row in sizes]
        tiles = 9
        pixels = np.zeros((len(sizes), tiles, 8, 8, 3), np.float32)
        theirs = []
        for number, row in enumerate(sizes):
            first = 0
            for size in row:
                drawn = random.standard_normal((ANYRES.tiles(size), 8, 8, 3)).astype(np.float32)
                pixels[number, first : first + len(drawn)] = drawn
                first += len(drawn)
                theirs.append(np.pad(drawn, ((0, 5 - len(drawn)), (0, 0), (0, 0), (0, 0))))
        ids, mask = rows(counts, None)
        length = max(map(sum, counts))
        index = np.stack([ANYRES.index(row, tiles=tiles, length=length) for row in sizes])
        flat = {"pixel_values": np.stack(theirs), "image_sizes": np.array([size for row in sizes for size in row])}
        return config, found.model, weights, {"pixels": pixels, "input_ids": ids, "index": index}, mask, flat
    ids, mask = rows([[found.model.tokens] * n for n in (2, 0, 1)], None)
    pixels = random.standard_normal((3, 2, 8, 8, 3)).astype(np.float32)
    flat = {"pixel_values": np.concatenate([pixels[0], pixels[2, :1]])}
    return config, found.model, weights, {"pixels": pixels, "input_ids": ids}, mask, flat


def reference_inputs(ids, mask, flat):
    import torch

    inputs = {"input_ids": torch.tensor(their_ids(ids)), "attention_mask": torch.tensor(mask, dtype=torch.long)}
    axes = (*range(flat["pixel_values"].ndim - 3), -1, -3, -2)
    inputs["pixel_values"] = torch.tensor(flat["pixel_values"].transpose(axes))
    if "image_sizes" in flat:
        inputs["image_sizes"] = torch.tensor(flat["image_sizes"])
    return inputs


@functools.cache
def ours(name):
    """Logits, their weights, the gradients of their weighted sum, and the embeddings, by path."""
    config, model, weights, batch, mask, _ = case(name)
    shape = (*mask.shape, model.decoder.vocabulary)
    weight = np.random.RandomState(9).standard_normal(shape).astype(np.float32) * mask[..., None]
    weight /= np.sqrt(mask.sum())

    @jax.jit
    def run(params, batch):
        def total(params):
            merged = model.embeddings(params, **batch)
            logits = model.logits(params, mask=mask, **batch)
            return (logits * weight).sum(), (logits, merged)

        return jax.value_and_grad(total, has_aux=True)(params)

    (_, (logits, merged)), grads = run(tree_of(config, weights), batch)
    return np.asarray(logits), weight, flatten(grads), merged


@pytest.mark.parametrize("name", [*OPTIONS, "next"])
def test_logits_and_gradients(name):
    """Of projector, tower, decoder and newline alike."""
    torch = pytest.importorskip("torch")
    config, _, weights, batch, mask, flat = case(name)
    reference = reference_llava(config, weights)
    theirs = reference(**reference_inputs(batch["input_ids"], mask, flat)).logits
    logits, weight, grads, _ = ours(name)
    np.testing.assert_allclose(logits[mask], theirs.detach().numpy()[mask], atol=2e-5, rtol=2e-5)
    (theirs * torch.tensor(weight)).sum().backward()
    named = dict(reference.named_parameters())
    found = {}
    for published in weights:
        if (parameter := named.get(in_memory(published))) is not None:
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            found[published] = grad.numpy()
    expected = flatten(tree_of(config, found))
    assert sorted(expected) == sorted(grads)
    for path, grad in grads.items():
        scale = max(1.0, float(np.abs(expected[path]).max()))
        np.testing.assert_allclose(np.asarray(grad) / scale, expected[path] / scale, atol=5e-5, rtol=1e-4, err_msg=path)
    moved = [path for path in expected if np.abs(expected[path]).max() > 1e-3]
    assert any("student" in path for path in moved) and any("projector" in path for path in moved)
    assert ("language/newline" in moved) == (name == "next")


@pytest.mark.parametrize("name", ["llava", "next"])
def test_greedy_tokens(name):
    """Rows padded on the left, with and without pictures, go on as transformers' do."""
    torch = pytest.importorskip("torch")
    config, model, weights, batch, mask, flat = case(name)
    params, embeddings = tree_of(config, weights), ours(name)[3]
    decoding = Decoding(new_tokens=6, pad=0)
    found = generate(model.decoder, params["language"]["model"], embeddings=embeddings, mask=mask, decoding=decoding)
    reference = reference_llava(config, weights)
    with torch.no_grad():
        theirs = reference.generate(
            **reference_inputs(batch["input_ids"], mask, flat), max_new_tokens=6, do_sample=False, pad_token_id=0,
            eos_token_id=None, bad_words_ids=None,
        ).numpy()[:, -6:]  # fmt: skip
    np.testing.assert_array_equal(found.tokens, theirs)
    assert len({tuple(row) for row in theirs}) == len(theirs)


@pytest.mark.parametrize("name", ["llava", "next"])
def test_golden_logits(name):
    """transformers' numbers without torch."""
    logits = ours(name)[0][case(name)[4]]
    np.testing.assert_allclose(logits[:: len(logits) // 12], np.load(GOLDEN)[name], atol=2e-5, rtol=2e-5)


def test_pictures_in_order():
    ids = np.array([[1, IMAGE_ID, IMAGE_ID, 2, IMAGE_ID], [1, 2, 3, 4, 5]])
    text = np.repeat(-ids[..., None], 2, axis=2).astype(np.float32)
    tokens = np.arange(16, dtype=np.float32).reshape(2, 4, 2) + 10

    @jax.jit
    def run(tokens):
        placed, back = jax.vjp(lambda tokens: place_pictures(text, ids, tokens), tokens)
        few, none = (place_pictures(text, ids, tokens[:, :count]) for count in (2, 0))
        return placed, few, none, back(jnp.ones_like(placed))[0]

    placed, few, none, taken = map(np.asarray, run(tokens))
    assert placed[0, :, 0].tolist() == [-1, 10, 12, -2, 14] and placed[1].tolist() == text[1].tolist()
    # Too few tokens show; rows that ask for none do not mind.
    assert np.isnan(few[0, 4]).all() and np.isfinite(few).sum() == 18
    assert np.isnan(none[0]).sum() == 6 and np.isfinite(none[1]).all()
    assert taken[..., 0].tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
    for wrong in (tokens[:1], tokens[..., :1], tokens[0]):
        with pytest.raises(InputError, match="pictures: expected"):
            place_pictures(text, ids, wrong)


def test_tiles_in_order():
    tokens = jnp.arange(8.0).reshape(1, 2, 2, 2)
    packed = jax.jit(pack_pictures)(tokens, jnp.array([-5.0, -6.0]), jnp.array([[3, 4, 0, -1]]))
    assert packed[0].tolist() == [[6, 7], [-5, -6], [0, 1], [0, 0]]


def test_what_does_not_fit():
    config, model, weights, batch, _, _ = case("llava")
    params = tree_of(config, weights)
    pixels, ids = batch["pixels"], batch["input_ids"]

    def shapes(model, params, *args, **options):
        return jax.eval_shape(lambda params: model.embeddings(params, *args, **options), params)

    with pytest.raises(InputError, match="pixels: expected"):
        shapes(model, params, pixels[:, 0], ids)
    with pytest.raises(InputError, match="index: expected none"):
        shapes(model, params, pixels, ids, index=ids)
    config, tiled, weights, batch, _, _ = case("next")
    with pytest.raises(InputError, match="index: expected one"):
        shapes(tiled, tree_of(config, weights), batch["pixels"], batch["input_ids"])
    with pytest.raises(InputError, match="did you mean 'mlp2x_gelu'"):
        jax.eval_shape(Projector(4, "mlp_gelu").init, jax.random.key(0), jnp.ones((1, 1, 4)))


def test_text_alone_is_the_decoder():
    config, model, weights, _, _, _ = case("llava")
    params, ids = tree_of(config, weights), np.array([[3, 4, 5]])

    @jax.jit
    def run(params):
        return model.logits(params, None, ids), model.decoder.apply({"params": params["language"]["model"]}, ids)[0]

    np.testing.assert_allclose(*run(params), atol=1e-5)


def test_axes_cover_every_parameter():
    model = case("next")[1]
    tree = jax.eval_shape(model.init, jax.random.key(0))
    specs = logical_specs(tree, logical_axes(), "axes")
    assert specs["language"]["model"]["layers"]["attention"]["key"]["kernel"] == ("layers", "embed", "kv_heads")
    assert specs["student"]["layers"]["attention"]["key"]["kernel"] == ("layers", "embed", "heads")
    assert specs["language"]["projector"]["hidden"]["kernel"] == ("embed", "mlp")
    assert isinstance(model, Llava) and IMAGE_TOKEN == model.decoder.vocabulary - 1
