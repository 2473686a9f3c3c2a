"""EVA-02's detection backbone against golden outputs of the authors' module, and against a plain NumPy one.

The golden is the output of the authors' PyTorch module for a tiny configuration, weights and input by the rules of
`tests.encoder_rules`; the module needs packages that do not install here, so nothing regenerates it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.encoder_rules import ENCODERS, draw_input, draw_weights, read_names
from tove_jax.errors import InputError
from tove_jax.experts.eva02 import canonical, rules
from tove_jax.hf.rules import flatten, to_tree
from tove_jax.models.eva02_det import LOGICAL_AXES, Eva02Detection
from tove_jax.models.position import resize_position
from tove_jax.parallel import logical_specs

DEPTH, EVERYWHERE, WINDOW, HEADS, PATCH = 4, (2,), 4, 4, 16
MODEL = Eva02Detection(
    grid=4, width=64, depth=DEPTH, heads=HEADS, mlp_width=170, global_layers=EVERYWHERE, window=WINDOW
)


@pytest.fixture(scope="module")
def weights():
    return draw_weights(read_names("eva02_det_names.json")["tiny"])


@pytest.fixture(scope="module")
def params(weights):
    tree = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    shapes = {path: leaf.shape for path, leaf in flatten(tree).items()}
    return jax.tree.map(jnp.asarray, to_tree(canonical(weights), rules(DEPTH, EVERYWHERE), shapes))


def plain(weights, pixels):
    """The same network a second time, float64: (B, H, W, 3) -> outputs of every layer."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    batch, high, wide = pixels.shape[0], pixels.shape[1] // PATCH, pixels.shape[2] // PATCH

    def linear(x, name, bias=None):
        return x @ w[f"{name}.weight"].T + (0.0 if bias is None else w[bias])

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def turn(x, rows, columns):
        """Pairs of channels as complex numbers, turned by the patch's row, then by its column."""
        x = x.reshape(*x.shape[:-1], -1, 2)
        numbers = x[..., 0] + 1j * x[..., 1]
        half = numbers.shape[-1] // 2
        speed = 10000.0 ** (-np.arange(half) / half)
        row, column = np.divmod(np.arange(rows * columns), columns)
        angles = np.concatenate([np.outer(row * 16 / rows, speed), np.outer(column * 16 / columns, speed)], -1)
        numbers = numbers * np.exp(1j * angles)
        return np.stack([numbers.real, numbers.imag], -1).reshape(*x.shape[:-2], -1)

    def attend(x, name):
        """On (rows, columns, D), the square that is looked at."""
        rows, columns, width = x.shape
        tokens = x.reshape(-1, width)
        parts = (("q", f"{name}.q_bias"), ("k", None), ("v", f"{name}.v_bias"))
        q, k, v = (
            linear(tokens, f"{name}.{part}_proj", bias).reshape(-1, HEADS, width // HEADS).swapaxes(0, 1)
            for part, bias in parts
        )
        scores = turn(q, rows, columns) @ turn(k, rows, columns).swapaxes(1, 2) / np.sqrt(width // HEADS)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(-1, width)
        return linear(y, f"{name}.proj", f"{name}.proj.bias").reshape(rows, columns, width)

    kernel = w["patch_embed.proj.weight"]
    patches = pixels.reshape(batch, high, PATCH, wide, PATCH, 3).swapaxes(2, 3)
    x = np.einsum("bhwijc,dcij->bhwd", patches, kernel) + w["patch_embed.proj.bias"]
    x = x + resize_position(w["pos_embed"][0], (high, wide))[1:].reshape(high, wide, -1)
    outputs = []
    for layer in range(DEPTH):
        name = f"blocks.{layer}"
        y = norm(x, f"{name}.norm1")
        step = (high, wide) if layer in EVERYWHERE else (WINDOW, WINDOW)
        attended = np.zeros_like(x)
        for picture in range(batch):
            for top in range(0, high, step[0]):
                for left in range(0, wide, step[1]):
                    inside = y[picture, top : top + step[0], left : left + step[1]]
                    square = np.zeros((*step, x.shape[-1]))
                    square[: inside.shape[0], : inside.shape[1]] = inside
                    found = attend(square, f"{name}.attn")[: inside.shape[0], : inside.shape[1]]
                    attended[picture, top : top + step[0], left : left + step[1]] = found
        x = x + attended
        y = norm(x, f"{name}.norm2")
        gate, up = (linear(y, f"{name}.mlp.w{i}", f"{name}.mlp.w{i}.bias") for i in (1, 2))
        y = norm(gate / (1 + np.exp(-gate)) * up, f"{name}.mlp.ffn_ln")
        x = x + linear(y, f"{name}.mlp.w3", f"{name}.mlp.w3.bias")
        outputs.append(x)
    return outputs


@pytest.fixture(scope="module")
def run():
    return jax.jit(lambda p, x: MODEL.apply({"params": p}, x, intermediates=("layers/1", "layers/-2")))


def test_equals_golden(run, params):
    pixels = draw_input(100, (2, 3, 128, 128)).transpose(0, 2, 3, 1)
    with np.load(ENCODERS / "eva02_det_tiny.npz") as golden:
        expected = golden["output"].transpose(0, 2, 3, 1)
    output, _ = run(params, pixels)
    np.testing.assert_allclose(output, expected, atol=3e-5)  # values to 9.8; the golden itself is off by 1.2e-5
    half, _ = jax.jit(lambda p, x: MODEL.clone(dtype=jnp.bfloat16).apply({"params": p}, x))(params, pixels)
    assert half.dtype == jnp.bfloat16
    assert 1e-4 < np.abs(half.astype(jnp.float32) - expected).mean() < 0.02 * np.abs(expected).mean()


@pytest.mark.parametrize("size", [(128, 128), (96, 144)])
def test_equals_a_plain_implementation(run, params, weights, size):
    """At the golden's size, where it vouches for the plain one, and not square, with windows that overhang."""
    pixels = draw_input(100, (2, 3, *size)).transpose(0, 2, 3, 1)
    expected = plain(weights, pixels)
    output, found = run(params, pixels)
    np.testing.assert_allclose(output, expected[-1], atol=2e-5)
    np.testing.assert_allclose(found["layers/1"], expected[1], atol=2e-5)
    np.testing.assert_allclose(found["layers/-2"], expected[-2], atol=2e-5)


def test_every_parameter_has_logical_axes(params):
    specs = flatten(logical_specs(params, LOGICAL_AXES, "eva02"))
    assert specs["layers/windowed/mlp/gate/kernel"] == ("layers", "embed", "mlp")
    assert specs["layers/global/mlp/norm/scale"] == ("layers", "mlp")
    assert "layers/global/attention/key/bias" not in specs


def test_a_side_that_is_no_multiple_is_refused(params):
    with pytest.raises(InputError, match=r"multiples of 16, found \(1, 64, 72, 3\)"):
        MODEL.apply({"params": params}, jnp.zeros((1, 64, 72, 3)))
