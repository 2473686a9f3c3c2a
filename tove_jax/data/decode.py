"""From the bytes of a picture file to pixels, whatever the file holds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tove_jax.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
MAX_PIXELS = 64_000_000
"""Pixels above which a picture is refused before it is decompressed; ours, 192 MB as RGB."""

_EXIF_ORIENTATION = 0x0112
# EXIF's orientation -> what brings the picture upright (EXIF 2.32, section 4.6.4 A).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes one JPEG, PNG, WebP or GIF (its first frame).

    Greyscale, palette and CMYK become RGB; transparency is laid on white; 16 bits a channel are
    scaled to 8; the EXIF orientation is applied.

    Args:
      data: the whole file.
      name: how errors call the picture, usually its path.
      max_pixels: larger pictures are refused by their header, before anything is decompressed.

    Returns:
      uint8 (H, W, 3), RGB, writable and contiguous.

    Raises:
      InputError: empty, of another format, corrupt, truncated, of zero size or too large.
    """
    if not data:
        raise InputError(f"picture {name}: expected a picture file, found an empty one (0 bytes)")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"picture {name}: expected at most {max_pixels:,} pixels, found more: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(
            f"picture {name}: expected {', '.join(FORMATS)}, found {len(data)} bytes that begin with "
            f"{bytes(data[:8])!r}"
        ) from error
    except Exception as error:  # a damaged header makes Pillow's readers fail in many ways
        raise InputError(f"picture {name}: corrupt header: {error}") from error
    width, height = picture.size
    if width == 0 or height == 0:
        raise InputError(f"picture {name}: expected sides of at least one pixel, found {width} x {height}")
    if width * height > max_pixels:
        raise InputError(
            f"picture {name}: expected at most {max_pixels:,} pixels, found {width} x {height} = {width * height:,}"
        )
    try:
        picture.load()
        return _to_rgb(_upright(picture))
    except Exception as error:  # damaged bytes make Pillow's readers fail in many ways
        raise InputError(
            f"picture {name}: {picture.format or 'file'} of {width} x {height} pixels and {len(data)} bytes is "
            f"corrupt or truncated: {error}"
        ) from error


def read_picture(path: Path | str) -> np.ndarray:
    """Reads and decodes a picture file.

    Args:
      path: of the file.

    Returns:
      uint8 (H, W, 3), RGB.

    Raises:
      InputError: it cannot be read, or `decode` refuses it.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"picture {path}: cannot be read: {error.strerror}") from error
    return decode(data, str(path))


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged EXIF data is common and says nothing of the pixels
        return picture
    turn = _TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I"):
        # 16-bit greyscale; Pillow's own conversion clips at 255 instead of scaling.
        wide = np.asarray(picture).astype(np.uint32).clip(0, 65535)
        grey = ((wide * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if picture.getextrema()[3][0] < 255:
            white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(white, picture)
    return np.array(picture.convert("RGB"))
