"""The student against transformers' CLIPVisionModel and the released MoLE tower."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.adapters.lora import AdapterFactory
from tove_jax.adapters.mole import MoLE, balance_loss
from tove_jax.models.vit import VisionTransformer
from tove_jax.parallel import flat_paths

VALUES, GRADIENTS = 1e-5, 1e-4


def build(case, **more):
    return VisionTransformer(
        image_size=case["image_size"],
        patch_size=case["patch_size"],
        width=case["width"],
        depth=case["layers"],
        heads=case["heads"],
        mlp_width=case["mlp_width"],
        activation=case["act"],
        **more,
    )


def ours(case, clip_vision, tree_from_torch):
    """The same numbers as `clip_vision.reference`, float32, in the student's tree."""
    model, depth = build(case), case["layers"]
    arrays = clip_vision.inputs(case)
    params = jax.tree.map(jnp.asarray, tree_from_torch(clip_vision.weights(case), depth))
    names = ["embeddings", *[f"layers/{i}" for i in range(depth)], "pooled"]
    names += [f"layers/{i}/attention_cls" for i in range(depth)]

    @jax.jit
    def run(params):
        # Whole layers scanned for the gradient, as training does; layer by layer for the values.
        def loss(params):
            _, found = model.apply({"params": params}, arrays["pixels"], intermediates=("layers/-2", "pooled"))
            value = (found["layers/-2"] * arrays["token_direction"]).sum()
            return value + (found["pooled"] * arrays["pooled_direction"]).sum()

        tokens, found = model.apply({"params": params}, arrays["pixels"], intermediates=names)
        return tokens, found, jax.grad(loss)(params)

    return jax.tree.map(np.asarray, run(params))


def assert_equal_to(reference, result, case, tree_from_torch):
    depth = case["layers"]
    tokens, found, gradients = result
    hidden = np.stack([found["embeddings"], *[found[f"layers/{i}"] for i in range(depth)]])
    np.testing.assert_allclose(hidden, reference["hidden_states"], atol=VALUES, rtol=VALUES)
    np.testing.assert_array_equal(tokens, found[f"layers/{depth - 1}"])
    np.testing.assert_allclose(found["pooled"], reference["pooled"], atol=VALUES, rtol=VALUES)
    rows = np.stack([found[f"layers/{i}/attention_cls"] for i in range(depth)])
    np.testing.assert_allclose(rows, reference["attention_cls"], atol=VALUES)
    state = {name.removeprefix("grads/"): a for name, a in reference.items() if name.startswith("grads/")}
    expected = flat_paths(tree_from_torch(state, depth))
    assert set(expected) == set(flat_paths(gradients))
    for name, gradient in flat_paths(gradients).items():
        # A key's bias has no gradient in exact arithmetic: what is left is the rounding of others.
        scale = 1.0 if name.endswith("key/bias") else np.abs(expected[name]).max()
        error = np.abs(gradient - expected[name]).max()
        assert error <= GRADIENTS * scale, f"{name}: {error} of {scale}"


@pytest.mark.parametrize("name", ["tiny_quick_gelu", "tiny_gelu"])
def test_equals_committed_numbers(name, clip_vision, tree_from_torch, goldens):
    case = clip_vision.CASES[name]
    with np.load(goldens / f"clip_vision_{name}.npz") as stored:
        assert_equal_to(dict(stored), ours(case, clip_vision, tree_from_torch), case, tree_from_torch)


@pytest.mark.parametrize("name", ["b32_quick_gelu", "b32_gelu", "l14_quick_gelu", "l14_gelu"])
def test_equals_transformers(name, clip_vision, tree_from_torch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    case = clip_vision.CASES[name]
    result = ours(case, clip_vision, tree_from_torch)
    assert_equal_to(clip_vision.reference(case), result, case, tree_from_torch)


@pytest.mark.goldens
@pytest.mark.parametrize("name", ["tiny_quick_gelu", "tiny_gelu"])
def test_committed_numbers_are_transformers(name, clip_vision, goldens):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    fresh = clip_vision.reference(clip_vision.CASES[name], double=True)
    with np.load(goldens / f"clip_vision_{name}.npz") as stored:
        assert set(stored.files) == set(fresh)
        for key in stored.files:
            np.testing.assert_allclose(stored[key], fresh[key], atol=1e-6, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("routing", ["top1", "dense"])
def test_equals_released_mole_tower(routing, tree_from_torch, goldens):
    with np.load(goldens / f"mole_tower_{routing}.npz") as stored:
        golden = dict(stored)
    config = json.loads(str(golden["config_json"]))
    depth, experts = config["num_hidden_layers"], config["num_experts"]
    case = dict(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        layers=depth,
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        act=config["hidden_act"],
    )
    fields = dict(experts=experts, rank=config["lora_rank"], alpha=config["lora_alpha"], routing=routing)
    model = build(case, adapter=AdapterFactory(MoLE, fields))

    def part(prefix):
        return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}

    state = part("weights/")
    params = jax.tree.map(jnp.asarray, tree_from_torch(state, depth, experts))
    pixels = golden["pixel_values"].transpose(0, 2, 3, 1).astype(np.float32)
    names = ["embeddings", *[f"layers/{i}" for i in range(depth)], "pooled", "layers/-2/attention_cls"]
    names += ["adapter/router_probs", "adapter/router_choice"]
    reports = ("layers/-2", "adapter/router_probs_mean", "adapter/router_choice_mean")

    @jax.jit
    def run(params):
        def loss(params):
            _, found = model.apply({"params": params}, pixels, intermediates=reports, final=False)
            balance = balance_loss(found["adapter/router_probs_mean"], found["adapter/router_choice_mean"]).mean()
            return (found["layers/-2"][:, 1:] ** 2).mean() + 0.01 * balance, balance

        _, found = model.apply({"params": params}, pixels, intermediates=names)
        return found, jax.value_and_grad(loss, has_aux=True)(params)

    found, ((loss, balance), gradients) = jax.tree.map(np.asarray, run(params))
    hidden = np.stack([found["embeddings"], *[found[f"layers/{i}"] for i in range(depth)]])
    np.testing.assert_allclose(hidden, golden["hidden_states"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found["pooled"], golden["pooled"], atol=1e-5, rtol=1e-5)
    second_last = golden["attention_second_last"][:, :, 0]
    np.testing.assert_allclose(found["layers/-2/attention_cls"], second_last, atol=1e-5)
    np.testing.assert_allclose(found["adapter/router_probs"], golden["router_probs"], atol=1e-5)
    np.testing.assert_array_equal(found["adapter/router_choice"], golden["router_choice"])
    np.testing.assert_allclose(balance, golden["balance_loss"], atol=1e-5)
    np.testing.assert_allclose(loss, golden["loss"], atol=1e-5, rtol=1e-5)

    stored = part("grads/")
    zeros = {name: np.zeros_like(value) for name, value in state.items()}
    expected = flat_paths(tree_from_torch(zeros | stored, depth, experts)["layers"]["mlp"]["adapter"])
    result = flat_paths(gradients["layers"]["mlp"]["adapter"])
    assert set(expected) == set(result)
    for name, gradient in result.items():
        np.testing.assert_allclose(gradient, expected[name], atol=1e-5, rtol=1e-5, err_msg=name)
        # The gradients are small, so that an absolute bound alone would say little.
        error = np.abs(gradient - expected[name]).max()
        assert error <= 1e-4 * np.abs(expected[name]).max(), f"{name}: {error}"
        if not name.startswith("router"):
            assert not gradient[-1].any(), f"{name}: the last layer lies behind the distilled feature"
