"""Low-rank updates: nothing at the start, peft's formula with its gradients, merged as unmerged, no kernel's gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.language_models import CONFIGS, VOCABULARY, draw, reference
from tove_jax.errors import InputError
from tove_jax.hf import llama as hf
from tove_jax.hf.rules import flatten, to_tree, unflatten
from tove_jax.language.decode import Decoding
from tove_jax.language.generate import generate
from tove_jax.models.llama import LOGICAL_AXES, abstract_params, init_lora, merge_lora
from tove_jax.parallel import logical_specs

TOKENS = np.random.RandomState(7).randint(0, VOCABULARY, (2, 7))
WEIGHTS = np.random.RandomState(3).standard_normal((*TOKENS.shape, VOCABULARY)).astype(np.float32)
RANK, ALPHA = 3, 5.0


@pytest.fixture(scope="module")
def model():
    """A model with biases and shared key heads, and updates that matter."""
    module = hf.from_config(CONFIGS["llama3"], lora_rank=RANK, lora_alpha=ALPHA)
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(module)).items()}
    params = jax.tree.map(jnp.asarray, to_tree(draw(CONFIGS["llama3"]), hf.table(), shapes))
    drawn = np.random.RandomState(4)
    lora = flatten(jax.jit(init_lora, static_argnums=0)(module, jax.random.key(0)))
    trained = {p: jnp.asarray(0.3 * drawn.standard_normal(a.shape), jnp.float32) for p, a in lora.items()}
    return module, params, unflatten(lora), unflatten(trained)


def logits_of(module, params, lora):
    return module.apply({"params": params, "lora": lora}, TOKENS)[0]


def test_fresh_updates_change_nothing(model):
    module, params, fresh, trained = model
    plain = jax.jit(lambda p: module.apply({"params": p}, TOKENS)[0])(params)
    run = jax.jit(logits_of, static_argnums=0)
    np.testing.assert_array_equal(run(module, params, fresh), plain)
    assert np.abs(run(module, params, trained) - plain).max() > 0.1
    paths = flatten(fresh)
    assert len(paths) == 2 * 7 and paths["layers/mlp/fc2/a_kernel"].shape == (2, 24, RANK)
    assert paths["layers/attention/key/b_kernel"].shape == (2, RANK, 8)
    a = paths["layers/mlp/gate/a_kernel"]
    assert 0.2 < np.abs(a).max() <= 0.25 and np.ptp(a[0] - a[1]) > 0.1  # within 1 / sqrt(16), every layer its own
    axes = logical_specs(fresh, LOGICAL_AXES, "axes")
    assert axes["layers"]["attention"]["value"]["b_kernel"] == ("layers", None, "kv_heads")


def test_merged_equals_unmerged(model):
    module, params, _, trained = model
    merge = jax.jit(merge_lora, static_argnums=0)
    merged = merge(module, params, trained)
    run = jax.jit(logits_of, static_argnums=0)
    np.testing.assert_allclose(run(module, params, trained), run(module.clone(lora_rank=0), merged, {}), atol=1e-5)
    half = jax.eval_shape(lambda p: merge(module, p, trained), jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    decoding = Decoding(new_tokens=5, ends=(2,), beams=2)
    beside = generate(module, params, TOKENS, decoding=decoding, lora=trained)
    np.testing.assert_array_equal(beside.tokens, generate(module, merged, TOKENS, decoding=decoding).tokens)


def test_gradients_are_of_the_updates_alone(model):
    """The cost of the backward pass is that of a model whose kernels are constants."""
    module, params, _, trained = model

    def loss(params, lora):
        return (logits_of(module, params, lora) * WEIGHTS).sum()

    alone = jax.jit(jax.grad(loss, argnums=1)).lower(params, trained).compile()
    both = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, trained).compile()
    kernels = sum(np.prod(leaf.shape) for path, leaf in flatten(params["layers"]).items() if path.endswith("/kernel"))
    saved = both.cost_analysis()["flops"] - alone.cost_analysis()["flops"]
    assert saved > 2 * TOKENS.size * kernels
    torch = pytest.importorskip("torch")
    for path, theirs in their_gradients(torch, trained).items():
        ours = flatten(alone(params, trained))[path]
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, np.abs(theirs).max()), err_msg=path)


def their_gradients(torch, lora):
    """Those of peft's formula, ``result + lora_B(lora_A(x)) * scaling``, hung onto transformers' linears."""
    names = {f"attention/{ours}": f"self_attn.{theirs}_proj" for ours, theirs in
             (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))}  # fmt: skip
    names |= {"mlp/gate": "mlp.gate_proj", "mlp/fc1": "mlp.up_proj", "mlp/fc2": "mlp.down_proj"}
    model = reference(CONFIGS["llama3"], draw(CONFIGS["llama3"]))
    leaves = {path: torch.tensor(np.asarray(leaf), requires_grad=True) for path, leaf in flatten(lora).items()}

    def hook(a, b):
        return lambda _, inputs, result: result + (inputs[0] @ a) @ b * (ALPHA / RANK)

    for ours, theirs in names.items():
        for layer in range(2):
            a, b = (leaves[f"layers/{ours}/{part}_kernel"][layer] for part in "ab")
            model.get_submodule(f"model.layers.{layer}.{theirs}").register_forward_hook(hook(a, b))
    (model(torch.tensor(TOKENS)).logits * torch.tensor(WEIGHTS)).sum().backward()
    return {path: leaf.grad.numpy() for path, leaf in leaves.items()}


def test_bad_input(model):
    module, params, _, trained = model
    with pytest.raises(InputError, match="rank of at least 1"):
        init_lora(module.clone(lora_rank=0), jax.random.key(0))
    with pytest.raises(InputError, match="lora_rank is 0"):
        jax.eval_shape(lambda: logits_of(module.clone(lora_rank=0), params, trained))
    with pytest.raises(InputError, match="attention/key/a_kernel: expected.*16, 2.*found.*16, 3"):
        merge_lora(module.clone(lora_rank=2), params, trained)
    other = {"layers": {"attention": trained["layers"]["attention"]}}
    with pytest.raises(InputError, match="mlp/fc1/a_kernel: expected.*found nothing"):
        merge_lora(module, params, other)
