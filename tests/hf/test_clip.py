"""The tables of CLIP and MoVE-KD's experts, against the model and the released names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.hf import clip, rules
from tove_jax.models import vit


@pytest.mark.parametrize("adapter", [{"kind": "none"}, {}, {"site": "ffn"}])
def test_shapes_are_the_models(make_student, adapter):
    student = make_student(**adapter)
    pixels = jnp.zeros((1, 28, 28, 3))
    params = jax.eval_shape(vit.from_config(student).init, jax.random.key(0), pixels)["params"]
    assert {path: leaf.shape for path, leaf in rules.flatten(params).items()} == clip.shapes(student)


@pytest.mark.parametrize("prefix", ["", "vision_model.", "vision_tower.", "model.vision_tower.vision_model."])
def test_released_names_both_ways(make_student, golden, assert_same, prefix):
    arrays, _, _ = golden("top1")
    named = clip.canonical({prefix + name: array for name, array in arrays.items()})
    tree = rules.to_tree(named, clip.RULES, clip.shapes(make_student()))
    assert_same(clip.released(rules.to_arrays(tree, clip.RULES)), arrays)
    assert clip.adapter_fields(named) == {"kind": "mole", "experts": 3, "rank": 4, "site": "linears"}
    kernel = arrays["encoder.layers.2.mlp.moe_up.1.lora_A.weight"]
    np.testing.assert_array_equal(tree["layers"]["mlp"]["adapter"]["up"]["a_kernel"][2, :, 1], kernel.T)


def test_one_tower_is_found_or_refused():
    tower = {"vision_model.encoder.layers.0.layer_norm1.bias": np.zeros(1)}
    text = {"text_model.encoder.layers.0.layer_norm1.bias": np.zeros(1), "logit_scale": np.zeros(())}
    assert sorted(clip.canonical({**tower, **text}))[0] == "encoder.layers.0.layer_norm1.bias"
    with pytest.raises(InputError, match="found none; it holds 2 arrays"):
        clip.canonical(text)
    with pytest.raises(InputError, match="found several: 'a.', 'vision_model.'"):
        clip.canonical({**tower, "a.encoder.layers.0.layer_norm1.bias": np.zeros(1)})
    both = {"encoder.layers.0.mlp.fc1.bias": np.zeros(1), "encoder.layers.0.mlp.original_module.fc1.bias": np.zeros(1)}
    with pytest.raises(InputError, match="two arrays are called"):
        clip.canonical(both)


def test_half_an_adapter_is_refused():
    with pytest.raises(InputError, match=r"mlp\.moe_down\.0\.lora_A\.weight is missing"):
        clip.adapter_fields({"encoder.layers.0.mlp.router.weight": np.zeros((3, 4))})
    with pytest.raises(InputError, match=r"mlp\.router\.weight is missing"):
        clip.adapter_fields({"encoder.layers.0.mlp.moe_down.0.lora_A.weight": np.zeros((3, 4))})
    assert clip.adapter_fields({}) == {"kind": "none"}
