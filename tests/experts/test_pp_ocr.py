"""PP-OCR detection against the onnx package's reference evaluator, and on a printed page.

The golden is made by ``python tests/experts/test_pp_ocr.py`` with ``onnx`` importable
(``pip install onnx``, Apache-2.0).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from skimage import data as photographs

from tove_jax.errors import InputError
from tove_jax.experts import pp_ocr
from tove_jax.experts.loading import package_file

pytest.importorskip("onnxruntime")
GOLDEN = Path(__file__).parents[1] / "goldens" / "experts" / "pp_ocr_det.npz"
SIZE = 64


def weights_file() -> Path:
    return package_file("rapidocr", "models/PP-OCRv6_det_small.onnx", "rapidocr")


def pictures() -> np.ndarray:
    """Returns the golden's two pictures, uint8 (2, 64, 64, 3): print, and 8 px squares of random colour."""
    page = np.repeat(photographs.page()[40:104, 40:104, None], 3, axis=-1)
    squares = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    return np.stack([page, np.kron(squares, np.ones((8, 8, 1), np.uint8))])


def reference() -> dict[str, np.ndarray]:
    """Returns the unedited graph's numbers, every node run by onnx's NumPy operators."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    blue_first = pictures()[..., ::-1].astype(np.float32) / 255
    images = ((blue_first - 0.5) / 0.5).transpose(0, 3, 1, 2)
    found = ReferenceEvaluator(onnx.load(weights_file())).run(None, {"x": images}, intermediate=True)
    neck = found[pp_ocr.NECK].transpose(0, 2, 3, 1)
    cells = np.stack([[neck[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean((1, 2)) for j in range(4)] for i in range(4)])
    return {"patches": cells.transpose(2, 0, 1, 3), "text": found[pp_ocr.PROBABILITY][:, 0]}


@pytest.fixture(scope="module")
def expert():
    """The expert at the golden's size."""
    return pp_ocr.load(size=SIZE)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.goldens
def test_golden_is_the_reference(golden) -> None:
    for name, values in reference().items():
        np.testing.assert_allclose(golden[name], values, atol=1e-5)


def test_equals_the_golden(expert, golden) -> None:
    features = expert.apply(expert.params, pictures())
    assert features.patches.shape == (2, 4, 4, 96) and features.patches.dtype == np.float32
    assert golden["patches"].std() > 0.1 and golden["text"].max() > 0.5
    np.testing.assert_allclose(features.patches, golden["patches"], atol=1e-4)
    np.testing.assert_allclose(expert.extras["text"](expert.params, pictures()), golden["text"], atol=1e-4)
    assert features.summary is None and features.cls_attention is None


def test_adding_an_output_changes_no_other(expert) -> None:
    import onnxruntime

    plain = onnxruntime.InferenceSession(weights_file().read_bytes(), providers=["CPUExecutionProvider"])
    assert [output.name for output in plain.get_outputs()] == [pp_ocr.PROBABILITY]
    images = expert.card.view.normalize(pictures()).transpose(0, 3, 1, 2)
    expected = plain.run(None, {"x": np.ascontiguousarray(images)})[0][:, 0]
    np.testing.assert_allclose(expert.extras["text"]({}, pictures()), expected, atol=1e-6)


def test_finds_print_and_no_print_in_a_cat() -> None:
    expert = pp_ocr.load(size=160, threads=2)
    page = np.repeat(photographs.page()[..., None], 3, axis=-1)
    cat = expert.card.view.cut(photographs.cat())
    text = expert.extras["text"]({}, np.stack([expert.card.view.cut(page), cat]))
    assert text.shape == (2, 160, 160)
    assert (text[0] > 0.5).mean() > 0.05 > 0.01 > (text[1] > 0.5).mean()
    assert expert.apply({}, cat[None]).patches.shape == (1, *expert.card.grid, expert.card.width)


def test_card_is_the_network(expert) -> None:
    card = expert.card
    assert (card.name, card.view.size, card.grid, card.backend) == ("pp_ocr_det", SIZE, (4, 4), "host")
    assert expert.weights_hash == hashlib.sha256(weights_file().read_bytes()).hexdigest()
    assert expert.params == {}


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.onnx"
    with pytest.raises(InputError, match=r"weights.onnx: cannot be read"):
        pp_ocr.load(weights=path)
    path.write_bytes(b"no protobuf")
    with pytest.raises(InputError, match=r"weights.onnx: expected the PP-OCRv6 small text detector"):
        pp_ocr.load(weights=path)
    path.write_bytes(weights_file().read_bytes()[:1_000_000])
    with pytest.raises(InputError, match=r"weights.onnx: expected the PP-OCRv6 small text detector"):
        pp_ocr.load(weights=path)
    recognizer = package_file("rapidocr", "models/ch_ppocr_mobile_v2.0_cls_mobile.onnx", "rapidocr")
    with pytest.raises(InputError, match=r"expected the PP-OCRv6 small text detector"):
        pp_ocr.load(weights=recognizer)
    with pytest.raises(InputError, match=r"threads: expected a positive number, found 0"):
        pp_ocr.load(threads=0)


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **reference())
