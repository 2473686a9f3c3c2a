"""Views against transformers' image processors (the Pillow ones), and by their properties."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from skimage import data as photographs

from tove_jax.data.view import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, View
from tove_jax.errors import InputError

LEVEL = 1 / 255


def reference(name: str, picture: np.ndarray, **settings: object) -> np.ndarray:
    """Returns (S, S, 3) normalised pixels of a transformers image processor."""
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, name)(**settings)
    return np.asarray(processor(picture, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)


def difference(view: View, picture: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference in units of [0, 1] before the division by the deviation."""
    return float(np.abs((view.normalize(view.cut(picture)) - expected) * np.asarray(view.std)).max())


@pytest.fixture(scope="module")
def wide() -> np.ndarray:
    return photographs.cat()  # 300 x 451


@pytest.fixture(scope="module")
def tall(wide: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(wide[:, 40:157])  # 300 x 117


@pytest.mark.parametrize("size", [64, 113, 336])
def test_crop_is_clips(wide: np.ndarray, tall: np.ndarray, size: int) -> None:
    settings = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    view = View(size)
    assert view == View.from_preprocessor(settings)
    for picture in (wide, tall, photographs.astronaut()):
        assert difference(view, picture, reference("CLIPImageProcessorPil", picture, **settings)) <= 1e-6


def test_crop_after_a_larger_resize(wide: np.ndarray) -> None:
    settings = {
        "size": 80, "crop_size": 64, "resample": 2, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD
    }  # fmt: skip
    view = View.from_preprocessor(settings)
    assert (view.size, view.resize, view.interpolation) == (64, 80, "bilinear")
    assert difference(view, wide, reference("CLIPImageProcessorPil", wide, **settings)) <= 1e-6


def test_pad_is_llavas(wide: np.ndarray, tall: np.ndarray) -> None:
    settings = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "do_pad": True}
    view = View.from_preprocessor(settings)
    assert view.fit == "pad"
    for picture in (wide, tall):
        assert difference(view, picture, reference("LlavaImageProcessorPil", picture, **settings)) <= 1e-6


def test_squash_is_siglips(wide: np.ndarray) -> None:
    settings = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    view = View.from_preprocessor(settings)
    assert view.fit == "squash"
    assert difference(view, wide, reference("SiglipImageProcessorPil", wide, **settings)) <= 1e-6


def test_our_exports_name_the_fit() -> None:
    settings = {"size": {"height": 8, "width": 8}, "do_center_crop": False, "tove_fit": "letterbox"}
    assert View.from_preprocessor(settings) == View(8, fit="letterbox")
    with pytest.raises(InputError, match="fit: expected crop"):
        View.from_preprocessor({**settings, "tove_fit": "stretch"})


def test_letterbox_is_sams(wide: np.ndarray, tall: np.ndarray) -> None:
    view = View(96, fit="letterbox", interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    for picture in (wide, tall):
        expected = reference(
            "SamImageProcessorPil", picture, size={"longest_edge": 96}, pad_size={"height": 96, "width": 96}
        )
        padding = (expected == 0).all(-1)
        assert 0 < padding.mean() < 1
        found = view.normalize(view.cut(picture))
        np.testing.assert_allclose(found[~padding], expected[~padding], atol=1e-5)
        assert np.abs(found[padding] * np.asarray(view.std)).max() <= 0.5 * LEVEL + 1e-6


@pytest.mark.parametrize("fit", ["crop", "letterbox", "pad", "squash"])
def test_every_fit_gives_the_size_and_changes_the_key(wide: np.ndarray, tall: np.ndarray, fit: str) -> None:
    view = View(48, fit=fit)
    for picture in (wide, tall, wide[:1, :1], wide[:300, :1], wide[:1]):
        pixels = view.cut(picture)
        assert pixels.shape == (48, 48, 3) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    others = [
        dataclasses.replace(view, size=64), dataclasses.replace(view, std=(1, 1, 1)), view.flipped(),
        dataclasses.replace(view, channels="bgr"), dataclasses.replace(view, interpolation="bilinear"),
    ]  # fmt: skip
    assert len({view.key(), *(other.key() for other in others)}) == 6


def test_key_survives_json_and_lists() -> None:
    view = View(48, mean=list(CLIP_MEAN))
    assert View(**view.describe()) == view == View(48)
    assert hash(view) == hash(View(48))
    assert View(**view.describe()).key() == view.key()


def test_flip_mirrors_the_picture(wide: np.ndarray) -> None:
    square = wide[:, 75:375]
    view = View(50)
    np.testing.assert_array_equal(view.flipped().cut(square), view.cut(np.ascontiguousarray(square[:, ::-1])))
    difference = view.flipped().cut(square)[:, ::-1].astype(int) - view.cut(square)
    assert np.abs(difference).max() <= 1
    assert view.flipped().flipped() == view


def test_grey_pictures_stay_grey() -> None:
    grey = np.repeat(photographs.camera()[..., None], 3, axis=-1)
    pixels = View(64).cut(grey)
    assert (pixels == pixels[..., :1]).all()


def test_normalize_channels_and_scale() -> None:
    pixels = np.array([[[10, 20, 30]]], np.uint8)
    caffe = View(1, mean=(104, 117, 123), std=(1, 1, 1), channels="bgr", scale=255.0)
    np.testing.assert_allclose(caffe.normalize(pixels)[0, 0], [30 - 104, 20 - 117, 10 - 123])
    clip = View(1)
    expected = (np.array([10, 20, 30]) / 255 - CLIP_MEAN) / CLIP_STD
    np.testing.assert_allclose(clip.normalize(pixels)[0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(clip.normalize)(pixels), clip.normalize(pixels), rtol=1e-5)
    assert clip.normalize(pixels).dtype == np.float32


def test_padding_colour_follows_the_channel_order(tall: np.ndarray) -> None:
    view = View(32, fit="letterbox", mean=(10, 20, 30), std=(1, 1, 1), channels="bgr", scale=255.0)
    assert view.cut(tall)[0, -1].tolist() == [30, 20, 10]
    assert np.abs(view.normalize(view.cut(tall))[0, -1]).max() == 0


def test_long_thin_pictures_take_little_memory() -> None:
    strip = np.zeros((4, 60_000, 3), np.uint8)
    strip[:, 29_000:31_000] = 200
    assert (View(336).cut(strip) == 200).all()  # scaled whole it would be 336 x 5,040,000
    padded = View(64, fit="pad").cut(strip)
    assert padded.shape == (64, 64, 3) and (padded[0] == padded[0, 0]).all()


@pytest.mark.parametrize(
    "picture",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.uint16),
     np.zeros((0, 8, 3), np.uint8), np.zeros((8, 8, 3), np.float32)],
)  # fmt: skip
def test_other_pictures_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"picture: expected uint8 \(height, width, 3\), found"):
        View(8).cut(picture)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"size": 0}, "size"), ({"fit": "stretch"}, "fit"), ({"interpolation": "lanczos"}, "interpolation"),
     ({"std": (1, 1, 0)}, "std"), ({"mean": (0, 0)}, "mean"), ({"mean": (0, 0, float("nan"))}, "mean"),
     ({"channels": "gbr"}, "channels"), ({"scale": 0}, "scale"), ({"resize": 4}, "resize"),
     ({"resize": 9, "fit": "pad"}, "resize")],
)  # fmt: skip
def test_fields_out_of_range_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"view: {message}: expected"):
        View(**{"size": 8, **fields})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"size": {"longest_edge": 8}}, "size"), ({}, "size"), ({"size": "8"}, "size"),
     ({"size": 8, "crop_size": {"height": 8, "width": 9}}, "crop_size"),
     ({"size": 8, "resample": 0}, "resample"), ({"size": 8, "rescale_factor": 1.0}, "rescale_factor"),
     ({"size": 8, "do_normalize": False}, "do_normalize")],
)  # fmt: skip
def test_preprocessors_no_view_expresses_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"p.json: {message}: expected"):
        View.from_preprocessor(settings, "p.json")
