from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.config import from_file
from tove_jax.config.schema import MeshConfig
from tove_jax.errors import InputError
from tove_jax.models import attention as attentions
from tove_jax.models import short_rows
from tove_jax.models import tpu_attention as kernels
from tove_jax.models.tpu_attention import block_of, check_kernel, suits, tpu_attention
from tove_jax.parallel import make_mesh
from tove_jax.train import objective


def drawn(batch, length, heads, key_heads, width):
    draw = np.random.default_rng(0)
    shapes = [(batch, length, count, width) for count in (heads, key_heads, key_heads, heads)]
    return [jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in shapes]


def with_gradients(attend, query, key, value, weight):
    def loss(*arrays):
        out = attend(*arrays)
        return (out * weight).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return [out, *gradients]


@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        ((2, 9, 4, 4, 64), False),  # short rows, two heads a register and two registers
        ((1, 20, 2, 1, 16), True),  # splash, two heads that share keys
    ],
)
def test_equals_attention_written_out(shape, causal):
    query, key, value, weight = drawn(*shape)
    assert short_rows.fits(shape[1], shape[2], shape[4]) != causal
    kernel = lambda q, k, v: tpu_attention(q, k, v, scale=0.2, causal=causal, interpret=True)
    plain = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, scale=0.2, is_causal=causal)
    for found, expected in zip(
        *(with_gradients(run, query, key, value, weight) for run in (kernel, plain)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(("shape", "causal"), [((9, 2, 2, 64), False), ((20, 2, 1, 16), True)])
def test_a_kernel_that_goes_wrong_is_refused_at_the_start(shape, causal, monkeypatch):
    check = lambda: check_kernel(*shape, jnp.bfloat16, causal=causal, interpret=True)
    assert 1e-4 < check() < 0.02
    kernel = kernels.tpu_attention
    # One key of a row is forgotten.
    wrong = lambda q, k, v, **more: kernel(q, k.at[:, 3].set(0), v, **more)
    monkeypatch.setattr(kernels, "tpu_attention", wrong)
    with pytest.raises(InputError, match=rf"kernel for rows of {shape[0]} tokens.*student.attention"):
        check()


def test_padding_behind_a_whole_row_is_not_seen():
    query, key, value, _ = drawn(1, 5, 1, 1, 24)  # no heads of 24 fill a register
    found = tpu_attention(query, key, value, interpret=True)
    np.testing.assert_allclose(found, jax.nn.dot_product_attention(query, key, value), atol=2e-6)


def test_each_device_computes_its_own_rows_and_heads():
    query, key, value, _ = drawn(4, 6, 4, 4, 64)
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        assert suits(query, key) and not suits(query[:3], key[:3]) and not suits(query[..., :48], key[..., :48])
        found = jax.jit(lambda *arrays: tpu_attention(*arrays, interpret=True))(query, key, value)
    assert found.sharding.spec[0] == ("data", "fsdp") and found.sharding.spec[2] == "tensor"
    np.testing.assert_allclose(found, jax.nn.dot_product_attention(query, key, value), atol=2e-6)


def test_what_does_not_suit_the_kernels_is_xlas(monkeypatch):
    query, key, value, _ = (x.astype(jnp.bfloat16) for x in drawn(1, 6, 2, 2, 64))
    asked = []
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(
        attentions.tpu_attention, "tpu_attention", lambda query, *_, **more: asked.append(more) or query
    )
    attentions.attention(query, key, value, causal=True)
    assert asked == [{"scale": None, "causal": True}]
    attentions.attention(query, key[:, :3], value[:, :3])
    attentions.attention(query, key, value, causal=True, window=2)
    attentions.attention(query, key, value, mask=jnp.ones((1, 6), bool))
    attentions.attention(query, key, value, "xla")
    assert len(asked) == 1
    with pytest.raises(InputError, match="neither bias nor mask"):
        attentions.attention(query, key, value, "pallas", mask=jnp.ones((1, 6), bool))
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not suits(query, key)  # no mesh says how to split them


def test_blocks_cover_the_row():
    assert [block_of(length) for length in (5, 577, 768, 2048)] == [(128, 128), (640, 640), (384, 768), (512, 2048)]


def test_a_run_checks_the_shapes_that_it_will_compute(monkeypatch):
    checked = []
    config = from_file(str(Path(__file__).parents[2] / "configs/move_kd_vit_l.py"), [])
    monkeypatch.setattr(objective, "check_kernel", lambda *shape, **more: checked.append((*shape, more)))
    objective.check_attention(config)
    assert not checked  # no TPU here
    monkeypatch.setattr(objective, "platform", lambda: "tpu")
    monkeypatch.setattr(attentions, "platform", lambda: "tpu")
    objective.check_attention(config)
    assert [shape[:4] for shape in checked] == [(577, 16, 16, 64), (2048, 32, 32, 128)]
    assert checked[1][-1] == {"causal": True}
