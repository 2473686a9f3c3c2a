from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="session")
def goldens():
    return GOLDENS


@pytest.fixture(scope="session")
def clip_vision():
    """The module that computes the reference numbers."""
    spec = importlib.util.spec_from_file_location("clip_vision_goldens", GOLDENS / "clip_vision.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tree_from_torch():
    """Torch names and layout to the student's tree, written a second time here, apart from `tove_jax.hf`."""

    def stack(state, depth, pattern, change=lambda a: a):
        return np.stack([change(state[pattern.format(layer)]) for layer in range(depth)])

    def linear(state, depth, pattern):
        kernel = stack(state, depth, pattern + ".weight", np.transpose)
        return {"kernel": kernel, "bias": stack(state, depth, pattern + ".bias")}

    def norm(state, depth, pattern):
        return {"scale": stack(state, depth, pattern + ".weight"), "bias": stack(state, depth, pattern + ".bias")}

    def lora(state, depth, half, experts):
        def each(suffix, change=lambda a: a):
            names = [f"encoder.layers.{{}}.mlp.moe_{half}.{e}.{suffix}" for e in range(experts)]
            return np.stack([stack(state, depth, name, change) for name in names], axis=1)

        return {
            "a_kernel": each("lora_A.weight", np.transpose).swapaxes(1, 2),  # (L, E, d, r) -> (L, d, E, r)
            "a_bias": each("lora_A.bias"),
            "b_kernel": each("lora_B.weight", np.transpose),
            "b_bias": each("lora_B.bias"),
        }

    def convert(state, depth, experts=0):
        layer = "encoder.layers.{}."
        mlp = layer + ("mlp.original_module." if experts else "mlp.")
        projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
        tree = {
            "patch_embed": {"kernel": state["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)},
            "class_embed": state["embeddings.class_embedding"],
            "position_embed": state["embeddings.position_embedding.weight"],
            "pre_norm": {"scale": state["pre_layrnorm.weight"], "bias": state["pre_layrnorm.bias"]},
            "post_norm": {"scale": state["post_layernorm.weight"], "bias": state["post_layernorm.bias"]},
            "layers": {
                "norm1": norm(state, depth, layer + "layer_norm1"),
                "norm2": norm(state, depth, layer + "layer_norm2"),
                "attention": {
                    ours: linear(state, depth, f"{layer}self_attn.{theirs}") for ours, theirs in projections.items()
                },
                "mlp": {"fc1": linear(state, depth, mlp + "fc1"), "fc2": linear(state, depth, mlp + "fc2")},
            },
        }
        if experts:
            tree["layers"]["mlp"]["adapter"] = {
                "router": linear(state, depth, layer + "mlp.router"),
                "down": lora(state, depth, "down", experts),
                "up": lora(state, depth, "up", experts),
            }
        return tree

    return convert
