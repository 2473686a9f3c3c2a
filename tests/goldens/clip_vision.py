"""Reference numbers from transformers' CLIPVisionModel; run as a script to write the golden files.

Weights are not stored: they come from NumPy's RandomState, whose stream is frozen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

CASES = {
    # Shaped like ViT-B/32 and ViT-L/14: their patch sizes and odd grids, few channels.
    "b32_quick_gelu": dict(image_size=96, patch_size=32, width=48, layers=2, heads=4, mlp_width=96, act="quick_gelu"),
    "b32_gelu": dict(image_size=96, patch_size=32, width=48, layers=2, heads=4, mlp_width=96, act="gelu"),
    "l14_quick_gelu": dict(image_size=42, patch_size=14, width=32, layers=6, heads=2, mlp_width=128, act="quick_gelu"),
    "l14_gelu": dict(image_size=44, patch_size=14, width=32, layers=6, heads=2, mlp_width=128, act="gelu"),
    "tiny_quick_gelu": dict(image_size=28, patch_size=7, width=24, layers=3, heads=3, mlp_width=48, act="quick_gelu"),
    "tiny_gelu": dict(image_size=28, patch_size=7, width=24, layers=3, heads=3, mlp_width=48, act="gelu"),
}
STORED = ("tiny_quick_gelu", "tiny_gelu")
BATCH = 2


def weights(case: dict) -> dict[str, np.ndarray]:
    """Returns float32 parameters under transformers' names, none of them zero or one."""
    width, hidden = case["width"], case["mlp_width"]
    tokens = 1 + (case["image_size"] // case["patch_size"]) ** 2
    draw = np.random.RandomState(7)
    found: dict[str, np.ndarray] = {}

    def put(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        found[name] = (mean + std * draw.standard_normal(shape)).astype(np.float32)

    def norm(name: str) -> None:
        put(f"{name}.weight", (width,), 0.2, 1.0)
        put(f"{name}.bias", (width,), 0.2)

    def linear(name: str, out: int, into: int) -> None:
        put(f"{name}.weight", (out, into), into**-0.5)
        put(f"{name}.bias", (out,), 0.2)

    put("embeddings.class_embedding", (width,), 1.0)
    side = case["patch_size"]
    put("embeddings.patch_embedding.weight", (width, 3, side, side), (3 * side * side) ** -0.5)
    put("embeddings.position_embedding.weight", (tokens, width), 0.5)
    norm("pre_layrnorm")
    for layer in range(case["layers"]):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"encoder.layers.{layer}.self_attn.{name}", width, width)
        norm(f"encoder.layers.{layer}.layer_norm1")
        norm(f"encoder.layers.{layer}.layer_norm2")
        linear(f"encoder.layers.{layer}.mlp.fc1", hidden, width)
        linear(f"encoder.layers.{layer}.mlp.fc2", width, hidden)
    norm("post_layernorm")
    return found


def inputs(case: dict) -> dict[str, np.ndarray]:
    """Returns pixels (B, H, W, 3) and the directions along which the loss looks at the outputs."""
    draw = np.random.RandomState(11)
    size, width = case["image_size"], case["width"]
    tokens = 1 + (size // case["patch_size"]) ** 2
    return {
        "pixels": draw.standard_normal((BATCH, size, size, 3)).astype(np.float32),
        "token_direction": draw.standard_normal((BATCH, tokens, width)).astype(np.float32),
        "pooled_direction": draw.standard_normal((BATCH, width)).astype(np.float32),
    }


def reference(case: dict, double: bool = False) -> dict[str, np.ndarray]:
    """Runs transformers. loss = sum(hidden_states[-2] * token_direction) + sum(pooled * pooled_direction)."""
    import torch
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=case["width"],
        intermediate_size=case["mlp_width"],
        num_hidden_layers=case["layers"],
        num_attention_heads=case["heads"],
        image_size=case["image_size"],
        patch_size=case["patch_size"],
        hidden_act=case["act"],
        attn_implementation="eager",
    )
    model = transformers.CLIPVisionModel(config).eval()
    names = {name.removeprefix("vision_model."): name for name, _ in model.named_parameters()}
    given = weights(case)
    assert set(names) == set(given)
    state = {names[name]: torch.from_numpy(value) for name, value in given.items()}
    model.load_state_dict(state, strict=False)
    arrays = {name: torch.from_numpy(value) for name, value in inputs(case).items()}
    if double:
        model = model.double()
        arrays = {name: value.double() for name, value in arrays.items()}
    result = model(pixel_values=arrays["pixels"].permute(0, 3, 1, 2), output_hidden_states=True, output_attentions=True)
    loss = (result.hidden_states[-2] * arrays["token_direction"]).sum()
    loss = loss + (result.pooler_output * arrays["pooled_direction"]).sum()
    loss.backward()
    found = {
        "hidden_states": torch.stack(result.hidden_states),
        "pooled": result.pooler_output,
        "attention_cls": torch.stack(result.attentions)[:, :, :, 0],
    }
    found = {name: value.detach().numpy().astype(np.float32) for name, value in found.items()}
    for name, parameter in model.named_parameters():
        found[f"grads/{name.removeprefix('vision_model.')}"] = parameter.grad.numpy().astype(np.float32)
    return found


if __name__ == "__main__":
    for stored in STORED:
        np.savez_compressed(Path(__file__).with_name(f"clip_vision_{stored}.npz"), **reference(CASES[stored], True))
