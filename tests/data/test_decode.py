"""Every kind of picture file becomes RGB, and every broken one an error that names it."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tove_jax.data.decode import decode, read_picture
from tove_jax.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encode(picture, kind="PNG", **options) -> bytes:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, bits=8, colour=2, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_lossless_rgb_is_exact():
    for data in (encode(PIXELS), encode(PIXELS, "WEBP", lossless=True)):
        result = decode(data, "a")
        assert result.dtype == np.uint8 and result.flags.writeable
        np.testing.assert_array_equal(result, PIXELS)


def test_jpeg():
    smooth = np.broadcast_to(np.arange(0, 240, 15, dtype=np.uint8)[None, :, None], (16, 16, 3))
    assert np.abs(decode(encode(np.ascontiguousarray(smooth), "JPEG", quality=95), "a").astype(int) - smooth).max() < 6


def test_greyscale_and_one_bit():
    grey = PIXELS[..., 0]
    np.testing.assert_array_equal(decode(encode(grey), "a"), np.repeat(grey[..., None], 3, 2))
    assert decode(encode(grey, "JPEG"), "a").shape == (6, 9, 3)
    black_white = Image.fromarray(grey).convert("1")
    assert set(np.unique(decode(encode(black_white), "a"))) == {0, 255}


def test_palette_with_transparency_on_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode(encode(picture), "a")[0], [[10, 20, 30], [40, 50, 60]])
    np.testing.assert_array_equal(decode(encode(picture, transparency=0), "a")[0], [[255] * 3, [40, 50, 60]])


def test_alpha_is_laid_on_white():
    picture = np.array([[[200, 100, 0, 0], [200, 100, 0, 255], [200, 100, 0, 128]]], np.uint8)
    result = decode(encode(picture), "a")[0].astype(int)
    np.testing.assert_array_equal(result[:2], [[255, 255, 255], [200, 100, 0]])
    expected = np.array([200, 100, 0]) * 128 / 255 + 255 * 127 / 255
    assert np.abs(result[2] - expected).max() <= 1
    grey = Image.fromarray(np.array([[[7, 0], [7, 255]]], np.uint8), "LA")
    np.testing.assert_array_equal(decode(encode(grey), "a")[0, :, 0], [255, 7])


def test_cmyk():
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    result = decode(encode(inks, "JPEG", quality=100), "a").astype(int)
    assert np.abs(result - [0, 255, 255]).max() < 4


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.array([[0, 256, 32768, 65535]], np.uint16)
    result = decode(encode(grey), "a")
    np.testing.assert_array_equal(result[0, :, 0], np.round(grey[0] / 257))
    np.testing.assert_array_equal(result[..., 0], result[..., 2])
    colour = np.array([[[0, 32768, 65535]]], ">u2")
    result = decode(png(1, 1, bits=16, rows=b"\0" + colour.tobytes()), "a")
    np.testing.assert_array_equal(result[0, 0], [0, 128, 255])


@pytest.mark.parametrize("orientation", range(1, 10))
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PIXELS, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode(data, "a"), expected)
    if orientation == 6:  # the camera was turned: shown a quarter turn clockwise
        np.testing.assert_array_equal(expected, np.rot90(PIXELS, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_leaves_the_pixels():
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"x"):
        np.testing.assert_array_equal(decode(encode(PIXELS, exif=exif), "a"), PIXELS)


def test_first_frame_of_a_gif():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(data, "a")[0, 0], [255, 0, 0])


NOISE = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated(kind):
    data = encode(NOISE, kind)
    assert decode(data, "ok").shape == (64, 64, 3)
    for keep in (len(data) // 2, 20):
        with pytest.raises(InputError, match=r"picture album/x\.bin"):
            decode(data[:keep], "album/x.bin")


def test_corrupt_bytes_inside():
    data = bytearray(encode(NOISE))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(InputError, match="picture x: PNG of 64 x 64 pixels and .* corrupt or truncated"):
        decode(bytes(data), "x")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "an empty one"),
        (b"<html>not found</html>", "begin with b'<html>no'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "begin with b'%!PS-Ado'"),
        (png(0, 5), "picture x"),
        (png(30000, 30000), "found more|900,000,000"),
        (png(9000, 9000), "9000 x 9000 = 81,000,000"),
    ],
)
def test_refused_naming_the_picture_and_what_was_found(data, found):
    with pytest.raises(InputError, match=found) as caught:
        decode(data, "x")
    assert str(caught.value).startswith("picture x: ")


def test_huge_is_refused_by_its_header_alone():
    assert decode(encode(PIXELS), "a", max_pixels=54).shape == (6, 9, 3)
    with pytest.raises(InputError, match="at most 53 pixels, found 9 x 6 = 54"):
        decode(encode(PIXELS), "a", max_pixels=53)


def test_read_picture(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(InputError, match="a.png: cannot be read"):
        read_picture(path)
    path.write_bytes(encode(PIXELS))
    np.testing.assert_array_equal(read_picture(path), PIXELS)
