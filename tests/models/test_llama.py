"""The Llama family against transformers: logits, gradients; caches, masks, packing, sharding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.language_models import CONFIGS, VOCABULARY, draw, reference
from tove_jax.errors import InputError
from tove_jax.hf import llama as hf
from tove_jax.hf.rules import flatten, to_arrays, to_tree
from tove_jax.models.causal import Rope, row_positions, visible
from tove_jax.models.llama import LOGICAL_AXES, abstract_params
from tove_jax.parallel import logical_specs

TOKENS = np.random.RandomState(7).randint(0, VOCABULARY, (2, 11))
LEFT = np.arange(11) >= np.array([[0], [4]])  # the second row is padded


def build(name, **options):
    config = CONFIGS[name]
    module = hf.from_config(config, **options)
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(module)).items()}
    return module, to_tree(draw(config), hf.table(), shapes)


def run(module, params, *args, **kwargs):
    """Applies under jit, which costs less than running op by op."""
    return jax.jit(lambda p, a, k: module.apply({"params": p}, *a, **k))(params, args, kwargs)


def loss(logits, mask):
    """A loss that looks at every logit of a token that is no padding."""
    weights = np.random.RandomState(3).standard_normal(logits.shape).astype(np.float32)
    return weights, mask[..., None]


@pytest.fixture(scope="module")
def outputs():
    """Logits and gradients of every configuration, by ours."""

    def compute(name):
        module, params = build(name)
        weights, mask = loss(np.zeros((*TOKENS.shape, VOCABULARY)), LEFT)

        def objective(params):
            logits, _ = module.apply({"params": params}, TOKENS, mask=LEFT)
            return (logits * weights * mask).sum(), logits

        (_, logits), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
        return np.asarray(logits), to_arrays(jax.tree.map(np.asarray, grads), hf.table())

    return compute


@pytest.mark.parametrize("name", list(CONFIGS))
def test_equal_to_transformers(name, outputs, goldens):
    """Both ways: against the library where it is there, and against its numbers kept in a file."""
    logits, grads = outputs(name)
    kept = np.load(goldens / "language" / "llama.npz")
    np.testing.assert_allclose(logits[LEFT], kept[f"{name}/logits"], atol=2e-5)
    for key in sorted(grads):
        norm = kept[f"{name}/gradient/{key}"]
        np.testing.assert_allclose(np.linalg.norm(grads[key]), norm, rtol=2e-4, err_msg=key)
    torch = pytest.importorskip("torch")
    theirs, their_grads = their_numbers(torch, name)
    np.testing.assert_allclose(logits[LEFT], theirs[LEFT], atol=2e-5)
    assert sorted(grads) == sorted(their_grads)
    for key, theirs in their_grads.items():
        np.testing.assert_allclose(grads[key], theirs, atol=2e-5 * max(1.0, np.abs(theirs).max()), err_msg=key)


def their_numbers(torch, name):
    model = reference(CONFIGS[name], draw(CONFIGS[name]))
    positions = torch.tensor(np.asarray(row_positions(jnp.asarray(LEFT))), dtype=torch.long)
    logits = model(torch.tensor(TOKENS), attention_mask=torch.tensor(LEFT).long(), position_ids=positions).logits
    weights, mask = loss(np.zeros(logits.shape), LEFT)
    (logits * torch.tensor(weights) * torch.tensor(mask)).sum().backward()
    return logits.detach().numpy(), {n: p.grad.numpy() for n, p in model.named_parameters()}


def write_goldens(path):
    """Writes the reference's numbers; run ``python -m tests.models.test_llama``."""
    import torch

    kept = {}
    for name in CONFIGS:
        logits, grads = their_numbers(torch, name)
        kept[f"{name}/logits"] = logits[LEFT].astype(np.float32)
        kept |= {f"{name}/gradient/{key}": np.float32(np.linalg.norm(grad)) for key, grad in grads.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **kept)


def test_a_cache_gives_the_same_numbers():
    """The prompt in two pieces and token by token, with a window, mixed layers and padding."""
    module, params = build("qwen2")
    whole, found = run(module, params, TOKENS, mask=LEFT)
    assert found == {}
    cache = module.make_cache(2, 13)
    step = jax.jit(lambda params, tokens, mask, cache: module.apply({"params": params}, tokens, mask=mask, cache=cache))
    parts = []
    for part in (slice(0, 5), slice(5, 10), slice(10, 11)):
        logits, found = step(params, TOKENS[:, part], LEFT[:, part], cache)
        cache = found["cache"]
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1)[LEFT], whole[LEFT], atol=1e-5)
    assert int(cache.used) == 11 and cache.mask[:, :11].tolist() == LEFT.tolist() and not cache.mask[:, 11:].any()
    rows = cache.take(jnp.array([1, 1, 0]))
    np.testing.assert_array_equal(rows.keys[:, 2], cache.keys[:, 0])
    np.testing.assert_array_equal(rows.mask[0], cache.mask[1])


def test_masks_paddings_and_packing_agree():
    """A text alone, padded left or right, or packed after another one, gives the same numbers."""
    module, params = build("mistral")
    text, other = TOKENS[:1, :6], TOKENS[1:, :5]
    alone, _ = run(module, params, text)
    rows = np.concatenate(
        [np.pad(text, ((0, 0), (5, 0))), np.pad(text, ((0, 0), (0, 5))), np.concatenate([other, text], 1)]
    )
    numbers = np.array([[0] * 5 + [1] * 6, [1] * 6 + [0] * 5, [1] * 5 + [2] * 6])
    assert row_positions(jnp.asarray(numbers))[2].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    packed, _ = run(module, params, rows, mask=jnp.asarray(numbers))
    for row, place in ((0, slice(5, 11)), (1, slice(0, 6)), (2, slice(5, 11))):
        np.testing.assert_allclose(packed[row, place], alone[0], atol=1e-5)
    unmasked, _ = run(module, params, rows[1:2])  # nothing looks ahead
    np.testing.assert_allclose(unmasked[0, :6], alone[0], atol=1e-5)
    assert np.abs(np.asarray(run(module, params, rows[2:])[0])[0, 5:] - alone[0]).max() > 0.1  # unlike without numbers


def test_visible():
    seen = visible(jnp.ones((1, 2), bool), jnp.array([[False, True, True, True]]), 2, window=2)
    assert seen[0].tolist() == [[False, True, True, False], [False, False, True, True]]


def test_intermediates_embeddings_places_and_remat():
    module, params = build("llama3")
    whole, _ = run(module, params, TOKENS)
    variables = {"params": params}

    @jax.jit
    def several(params):
        variables = {"params": params}
        embedded = module.apply(variables, TOKENS, method="embed")
        names = ("embeddings", "layers/0", "layers/-1", "hidden")
        nothing, found = module.apply(variables, embeddings=embedded, intermediates=names, final=False)
        assert nothing is None and tuple(found) == names
        head = module.apply(variables, found["hidden"], method="logits")
        some, _ = module.apply(variables, TOKENS, at=jnp.array([[10], [3]]))
        return embedded, found, head, some

    embedded, found, head, some = several(params)
    np.testing.assert_array_equal(found["embeddings"], embedded)
    np.testing.assert_allclose(head, whole, atol=1e-5)
    np.testing.assert_allclose(some[:, 0], whole[[0, 1], [10, 3]], atol=1e-5)
    assert np.abs(found["layers/0"] - found["layers/-1"]).max() > 0.1

    def gradient(remat):
        other = hf.from_config(CONFIGS["llama3"], remat=remat)
        return jax.jit(jax.grad(lambda p: other.apply({"params": p}, TOKENS)[0].std()))(params)

    kept = gradient("none")
    for ours, theirs in zip(jax.tree.leaves(gradient("full")), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for wrong in ("layers/9", "layers/0/attention_cls", "pooled"):
        with pytest.raises(InputError, match=wrong):
            module.apply(variables, TOKENS, intermediates=(wrong,))
    for arguments, message in (
        ({}, "either tokens"),
        ({"tokens": TOKENS * 1.0}, "expected integers"),
        ({"embeddings": jnp.zeros((2, 3, 5))}, "embeddings"),
        ({"tokens": TOKENS, "mask": LEFT[:, 1:]}, "mask"),
        ({"tokens": TOKENS, "cache": module.make_cache(2, 4)}, "cache"),
    ):
        with pytest.raises(InputError, match=message):
            module.apply(variables, **arguments)


def test_half_precision_keeps_float32_logits():
    module, params = build("llama")
    half = module.clone(dtype=jnp.bfloat16)
    whole, _ = run(module, params, TOKENS)
    logits, found = run(half, jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params), TOKENS)
    assert logits.dtype == jnp.float32
    assert np.std(logits - whole) < 0.08 * np.std(whole)  # eight bits, some twenty roundings in a row


def test_every_parameter_has_axes():
    for name in CONFIGS:
        tree = abstract_params(hf.from_config(CONFIGS[name]))
        axes = flatten(
            jax.tree.map(list, logical_specs(tree, LOGICAL_AXES, "axes"), is_leaf=lambda x: type(x) is tuple)
        )
        assert axes["layers/attention/key/kernel"] == ["layers", "embed", "kv_heads"]
        assert axes["token_embed"] == ["vocab", "embed"]


def test_scaling_needs_a_length():
    with pytest.raises(InputError, match="trained length"):
        Rope(scaling="dynamic", factor=2.0)


if __name__ == "__main__":
    from pathlib import Path

    write_goldens(Path(__file__).parents[1] / "goldens" / "language" / "llama.npz")
