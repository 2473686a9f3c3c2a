"""RoBERTa as a decoder against transformers: logits, gradients; adaptors, pictures, caches, groups."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import AS_USERS
from tests.roberta_models import CONFIG, PICTURES, PICTURES_MASK, VOCABULARY, build, reference
from tove_jax.config.schema import OptimConfig
from tove_jax.errors import InputError
from tove_jax.hf import roberta as hf
from tove_jax.hf.rules import flatten, to_arrays, unflatten
from tove_jax.models.causal import row_positions
from tove_jax.models.roberta import LOGICAL_AXES, Roberta, abstract_params
from tove_jax.parallel import first_match, logical_specs

TOKENS = np.random.RandomState(7).randint(3, VOCABULARY, (2, 9))
LEFT = np.arange(9) >= np.array([[0], [3]])  # the second row is padded
SEEN, SEEN_MASK = PICTURES[:2], PICTURES_MASK[:2]
WEIGHTS = np.random.RandomState(3).standard_normal((*TOKENS.shape, VOCABULARY)).astype(np.float32) * LEFT[..., None]


def run(module, params, *args, **kwargs):
    """Applies under jit, which costs less than running op by op."""
    return jax.jit(lambda p, a, k: module.apply({"params": p}, *a, **k))(params, args, kwargs)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def adapted():
    """Pictures of another width, adaptors that add something, which fresh ones do not."""
    module = Roberta(
        vocabulary=VOCABULARY, width=16, depth=2, heads=4, mlp_width=24, picture_width=12, adaptor_width=6, longest=20
    )
    leaves = flatten(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    assert not leaves["layers/adaptor/up/kernel"].any() and leaves["layers/adaptor/down/kernel"].all()
    drawn = np.random.RandomState(1)
    return module, unflatten({p: jnp.asarray(a + 0.3 * drawn.standard_normal(a.shape), jnp.float32)
                              for p, a in leaves.items()})  # fmt: skip


def test_equal_to_transformers(model, goldens):
    """Both ways: against the library where it is there, and against its numbers kept in a file."""
    module, params = model
    module = module.clone(remat="full")

    def objective(params):
        logits, _ = module.apply({"params": params}, TOKENS, mask=LEFT, pictures=SEEN, pictures_mask=SEEN_MASK)
        return (logits * WEIGHTS).sum(), logits

    # With weights this large, programs that are compiled in other ways differ by 6e-5.
    step = jax.jit(jax.value_and_grad(objective, has_aux=True), compiler_options=AS_USERS)
    (_, logits), grads = step(params)
    grads = to_arrays(jax.tree.map(np.asarray, grads), hf.table())
    kept = np.load(goldens / "language" / "roberta.npz")
    # jax 0.12 rounds otherwise than 0.10, whose distance is below 5e-5: 7.5e-5 at most.
    np.testing.assert_allclose(logits[LEFT], kept["logits"], atol=1e-4)
    for key in sorted(grads):
        # Keys' biases have no gradient but for rounding.
        norm = kept[f"gradient/{key}"]
        np.testing.assert_allclose(np.linalg.norm(grads[key]), norm, rtol=2e-4, atol=1e-4, err_msg=key)
    torch = pytest.importorskip("torch")
    theirs, their_grads, alone = their_numbers(torch)
    np.testing.assert_allclose(logits[LEFT], theirs[LEFT], atol=5e-5)
    assert sorted(grads) == sorted(their_grads)
    for key, theirs in their_grads.items():
        np.testing.assert_allclose(grads[key], theirs, atol=5e-5 * max(1.0, np.abs(theirs).max()), err_msg=key)
    np.testing.assert_allclose(run(module, params, TOKENS[:1])[0], alone, atol=5e-5)


def their_numbers(torch):
    model = reference()
    positions = torch.tensor(np.asarray(row_positions(jnp.asarray(LEFT))) + 2, dtype=torch.long)
    logits = model(
        torch.tensor(TOKENS),
        attention_mask=torch.tensor(LEFT).long(),
        position_ids=positions,
        encoder_hidden_states=torch.tensor(SEEN),
        encoder_attention_mask=torch.tensor(SEEN_MASK).long(),
    ).logits
    (logits * torch.tensor(WEIGHTS)).sum().backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    with torch.no_grad():
        alone = model(torch.tensor(TOKENS[:1])).logits
    return logits.detach().numpy(), grads, alone.numpy()


def write_goldens(path):
    """Writes the reference's numbers; run ``python -m tests.models.test_roberta``."""
    import torch

    logits, grads, _ = their_numbers(torch)
    kept = {"logits": logits[LEFT], **{f"gradient/{name}": np.linalg.norm(grad) for name, grad in grads.items()}}
    np.savez_compressed(path, **{name: np.float32(array) for name, array in kept.items()})


def by_hand(params, text, pictures):
    """One row through the whole model in float64, written down from the paper's formulas."""
    erf = np.vectorize(math.erf)
    p = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}

    def norm(x, name, layer=...):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}/scale"][layer] + p[f"{name}/bias"][layer]

    def linear(x, name, layer=...):
        return x @ p[f"{name}/kernel"][layer] + p[f"{name}/bias"][layer]

    def gelu(x):
        return x * (1 + erf(x / 2**0.5)) / 2

    def attend(x, y, name, layer, causal):
        heads = [linear(z, f"layers/{name}/{part}", layer).reshape(len(z), 4, 4)
                 for z, part in ((x, "query"), (y, "key"), (y, "value"))]  # fmt: skip
        scores = np.einsum("thd,shd->hts", *heads[:2]) / 2
        if causal:
            scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", shares / shares.sum(-1, keepdims=True), heads[2])
        return linear(mixed.reshape(len(x), -1), f"layers/{name}/out", layer)

    x = norm(p["token_embed"][text] + p["position_embed"][2 : 2 + len(text)] + p["type_embed"][0], "embed_norm")
    for n in range(2):
        x = norm(x + attend(x, x, "attention", n, True), "layers/attention_norm", n)
        x = norm(x + attend(x, pictures, "cross", n, False), "layers/cross_norm", n)
        hidden = np.maximum(linear(x, "layers/adaptor/down", n), 0) ** 2
        x = norm(x + linear(hidden, "layers/adaptor/up", n), "layers/adaptor_norm", n)
        x = norm(x + linear(gelu(linear(x, "layers/mlp/fc1", n)), "layers/mlp/fc2", n), "layers/mlp_norm", n)
    return norm(gelu(linear(x, "head/dense")), "head/norm") @ p["token_embed"].T + p["head/bias"]


def test_adaptors_and_pictures_of_another_width(adapted):
    module, params = adapted
    logits, _ = run(module, params, TOKENS, pictures=SEEN[..., :12])
    for row in range(2):
        np.testing.assert_allclose(logits[row], by_hand(params, TOKENS[row], SEEN[row, :, :12]), atol=2e-4)


def test_a_row_without_pictures_is_text_alone(adapted):
    """Beside rows that have some; and no place of a picture that is masked matters, nor does its gradient break."""
    module, params = adapted
    pictures = np.where(SEEN_MASK[..., None], SEEN[..., :12], 1e3).astype(np.float32)
    mask = np.array([[False] * 5, SEEN_MASK[1]])

    @jax.jit
    def both(params):
        logits, _ = module.apply({"params": params}, TOKENS, pictures=pictures, pictures_mask=mask)
        return logits.std(), logits

    grads, logits = jax.jit(jax.grad(both, has_aux=True))(params)
    np.testing.assert_allclose(logits[:1], run(module, params, TOKENS[:1])[0], atol=1e-5)
    np.testing.assert_allclose(logits[1:], run(module, params, TOKENS[1:], pictures=pictures[1:, :3])[0], atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    with_none = run(module, params, TOKENS[1:])[0]
    assert np.abs(logits[1:] - with_none).max() > 0.1


def test_a_cache_gives_the_same_numbers_and_reads_pictures_once(model):
    """The prompt in two pieces and token by token, with padding; rows that share pictures."""
    module, params = model
    pictures = {"pictures": SEEN, "pictures_mask": SEEN_MASK}
    whole, found = run(module, params, TOKENS, mask=LEFT, **pictures)
    assert found == {}
    step = jax.jit(lambda params, tokens, cache, more: module.apply({"params": params}, tokens, cache=cache, **more))
    cache, parts, shared = module.make_cache(2, 9), [], None
    for part in (slice(0, 5), slice(5, 8), slice(8, 9)):
        if part.start == 8:
            chosen = cache.take(jnp.array([1, 1, 0])).take(jnp.array([2, 1]))
            shared, _ = step(params, TOKENS[:, part], chosen, {})
        more = {"mask": LEFT[:, part]} | (pictures if not part.start else {})
        logits, found = step(params, TOKENS[:, part], cache, more)
        cache = found["cache"]
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1)[LEFT], whole[LEFT], atol=5e-5)
    np.testing.assert_allclose(shared[:, 0], whole[:, 8], atol=5e-5)
    assert cache.pictures.keys.shape == (2, 2, 5, 4, 4) and int(cache.text.used) == 9


def test_intermediates_and_options(adapted):
    module, params = adapted
    pictures = SEEN[..., :12]
    whole, _ = run(module, params, TOKENS, pictures=pictures)

    @jax.jit
    def several(params):
        variables = {"params": params}
        embedded = module.apply(variables, TOKENS, method="embed")
        names = ("embeddings", "layers/0", "layers/-1", "hidden")
        nothing, found = module.apply(
            variables, embeddings=embedded, pictures=pictures, intermediates=names, final=False
        )
        assert nothing is None and tuple(found) == names
        head = module.apply(variables, found["hidden"], method="logits")
        some, _ = module.apply(variables, TOKENS, pictures=pictures, at=jnp.array([[8], [3]]))
        return found, head, some

    found, head, some = several(params)
    np.testing.assert_allclose(head, whole, atol=1e-5)
    np.testing.assert_array_equal(found["hidden"], found["layers/-1"])
    np.testing.assert_allclose(some[:, 0], whole[[0, 1], [8, 3]], atol=1e-5)
    half, _ = run(module.clone(dtype=jnp.bfloat16), params, TOKENS, pictures=pictures)
    assert half.dtype == jnp.float32 and np.std(half - whole) < 0.05 * np.std(whole)


def test_texts_packed_into_a_row(adapted):
    """Each has its own positions and sees the row's pictures."""
    module, params = adapted
    numbers = np.array([[1] * 4 + [2] * 5])
    packed, _ = run(module, params, TOKENS[:1], mask=numbers, pictures=SEEN[:1, :, :12])
    alone, _ = run(module, params, TOKENS[:1, 4:], pictures=SEEN[:1, :, :12])
    np.testing.assert_allclose(packed[:, 4:], alone, atol=1e-5)


def test_groups_and_axes(adapted):
    """The default groups train what ToVE trains: cross-attention, adaptors, head, without the tied embedding."""
    tree = abstract_params(adapted[0])
    logical_specs(tree, LOGICAL_AXES, "axes")
    factors = first_match(OptimConfig().groups, [f"language/model/{path}" for path in flatten(tree)], "groups")
    trained = {path.removeprefix("language/model/") for path, factor in factors.items() if factor is not None}
    assert {"/".join(path.split("/")[:2]) for path in trained} == {
        "layers/cross", "layers/cross_norm", "layers/adaptor", "layers/adaptor_norm", "head/dense", "head/norm",
        "head/bias",
    }  # fmt: skip
    assert len(factors) - len(trained) == 5 + 8 + 2 + 4 + 2  # embeddings, self-attention, MLP and their norms


def test_bad_input(adapted):
    module, params = adapted
    wide = SEEN[..., :12]
    for arguments, message in (
        ({"pictures": SEEN}, r"pictures: expected \(2, tokens, 12\)"),
        ({"pictures": wide[:1]}, "pictures: expected"),
        ({"pictures": wide, "pictures_mask": SEEN_MASK[:, 1:]}, "pictures_mask: expected"),
        ({"pictures_mask": SEEN_MASK}, "expected pictures beside it"),
        ({"intermediates": ("layers/7",)}, "layers/7"),
        ({"tokens": np.zeros((1, 21), int)}, "at most 20 a row"),
        ({"cache": module.make_cache(2, 21)}, "at most 20 a row"),
        ({"mask": LEFT[:, 1:]}, "mask: expected"),
    ):
        with pytest.raises(InputError, match=message):
            told = {"tokens": TOKENS, **arguments}
            jax.eval_shape(lambda told=told: module.apply({"params": params}, **told))
    with pytest.raises(InputError, match="no cross-attention"):
        bare = hf.from_config(CONFIG | {"add_cross_attention": False})
        jax.eval_shape(lambda: bare.init(jax.random.key(0), TOKENS, pictures=SEEN))


if __name__ == "__main__":
    from pathlib import Path

    write_goldens(Path(__file__).parents[1] / "goldens" / "language" / "roberta.npz")
