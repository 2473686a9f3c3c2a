from __future__ import annotations

import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.hf.folding import fold_batch_norms, unfolded_shapes


def draw(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def arrays():
    return {
        "a.weight": draw(4, 3, 1, 1),
        "a.bias": draw(4, seed=1),
        "b.weight": draw(2, 4, 1),
        **{f"{norm}.{part}": draw(width, seed=seed) for norm, width in (("an", 4), ("bn", 2))
           for seed, part in enumerate(("weight", "bias", "running_mean"))},
        "an.running_var": draw(4, seed=7) ** 2,
        "bn.running_var": draw(2, seed=8) ** 2,
        "an.num_batches_tracked": np.int64(3),
        "other": draw(5),
    }  # fmt: skip


PAIRS = (("a", "an"), ("b", "bn"))


def test_one_convolution_does_what_two_layers_did(arrays):
    folded = fold_batch_norms(arrays, PAIRS, epsilon=1e-3)
    assert sorted(folded) == ["a.bias", "a.weight", "b.bias", "b.weight", "other"]
    for name, norm, width in (("a", "an", 3), ("b", "bn", 4)):
        x = draw(9, width, seed=9)
        y = x @ arrays[f"{name}.weight"].reshape(-1, width).T + arrays.get(f"{name}.bias", 0)
        y = (y - arrays[f"{norm}.running_mean"]) / np.sqrt(arrays[f"{norm}.running_var"] + 1e-3)
        y = y * arrays[f"{norm}.weight"] + arrays[f"{norm}.bias"]
        found = x @ folded[f"{name}.weight"].reshape(-1, width).T + folded[f"{name}.bias"]
        np.testing.assert_allclose(found, y, atol=1e-4)
        assert folded[f"{name}.weight"].dtype == folded[f"{name}.bias"].dtype == np.float32
        assert folded[f"{name}.weight"].shape == arrays[f"{name}.weight"].shape


def test_published_shapes_come_back(arrays):
    folded = {name: array.shape for name, array in fold_batch_norms(arrays, PAIRS, epsilon=1e-3).items()}
    published = {name: array.shape for name, array in arrays.items() if array.shape}
    biased, plain = (unfolded_shapes(folded, PAIRS[i : i + 1], biased=i == 0) for i in (0, 1))
    assert {**biased, **plain}.keys() == published.keys() | {"b.bias"}
    assert "b.bias" not in plain and plain["bn.running_mean"] == (2,) and biased["an.weight"] == (4,)


def test_faults(arrays):
    with pytest.raises(InputError, match="net.pth: 2 arrays are missing: a.weight, bn.running_var"):
        kept = {name: array for name, array in arrays.items() if name not in ("a.weight", "bn.running_var")}
        fold_batch_norms(kept, PAIRS, epsilon=1e-3, source="net.pth")
    with pytest.raises(InputError, match=r"an.bias has shape \(3,\), a.weight has \(4, 3, 1, 1\)"):
        fold_batch_norms({**arrays, "an.bias": draw(3)}, PAIRS, epsilon=1e-3)
