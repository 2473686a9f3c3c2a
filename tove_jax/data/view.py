"""A view: how a picture is cut and scaled before a network sees it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from tove_jax.config.schema import StudentConfig
from tove_jax.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Fit = Literal["crop", "letterbox", "pad", "squash"]
Interpolation = Literal["bilinear", "bicubic"]

# Above this, a long thin picture is not scaled or padded whole: only what is kept is computed.
_LARGEST = 1 << 26


@dataclasses.dataclass(frozen=True)
class View:
    """Size, crop, interpolation, flip and normalisation of the picture one network sees.

    Attributes:
      size: height and width of the result, pixels.
      fit: ``crop`` scales the shorter side to `resize` and cuts the centre; ``letterbox`` scales
        the longer side to `size` and pads right and bottom with the mean colour, which
        normalisation turns into zero to within half a level (SAM); ``pad`` pads to a centred
        square with the mean colour, then scales (LLaVA, stage 2); ``squash`` ignores the aspect.
      interpolation: Pillow's filter.
      mean, std: per channel, for values in [0, scale], in the order of ``channels``.
      channels: order in which the network wants them.
      scale: the value that 255 maps to before mean and std (1 for most; 255 for Caffe's networks).
      flip: mirror left to right, first of all.
      resize: only for ``crop``: the shorter side before the cut; None: `size`.

    Raises:
      InputError: a field is out of its range.
    """

    size: int
    fit: Fit = "crop"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    channels: Literal["rgb", "bgr"] = "rgb"
    scale: float = 1.0
    flip: bool = False
    resize: int | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        for name, valid, expected in (
            ("size", self.size > 0, "a positive number of pixels"),
            ("fit", self.fit in get_args(Fit), "/".join(get_args(Fit))),
            (
                "interpolation",
                self.interpolation in get_args(Interpolation),
                "/".join(get_args(Interpolation)),
            ),
            ("mean", len(self.mean) == 3 and all(map(math.isfinite, self.mean)), "three finite numbers"),
            ("std", len(self.std) == 3 and all(0 < v < math.inf for v in self.std), "three positive numbers"),
            ("channels", self.channels in ("rgb", "bgr"), "rgb/bgr"),
            ("scale", 0 < self.scale < math.inf, "a positive number"),
            (
                "resize",
                self.resize is None or (self.fit == "crop" and self.resize >= self.size),
                f"nothing, or with fit 'crop' at least the size of {self.size}",
            ),
        ):
            if not valid:
                raise InputError(f"view: {name}: expected {expected}, found {getattr(self, name)!r}")

    @classmethod
    def from_preprocessor(cls, settings: Mapping[str, Any], where: str = "preprocessor_config.json") -> View:
        """Reads a Hugging Face image processor's settings (CLIP's and its relatives').

        Args:
          settings: the content of ``preprocessor_config.json``; its ``tove_fit``, which our exports
            have, names a fit that those processors lack.
          where: the file, for messages.

        Returns:
          The view that gives the same pixels.

        Raises:
          InputError: a setting that no view expresses.
        """

        def sides(name: str) -> dict[str, int]:
            value = settings.get(name)
            value = {} if value is None else value
            if isinstance(value, int):
                value = {"shortest_edge": value} if name == "size" else {"height": value, "width": value}
            if not isinstance(value, dict):
                raise InputError(f"{where}: {name}: expected a number or sides, found {value!r}")
            return value

        def refuse(name: str, expected: str) -> None:
            raise InputError(f"{where}: {name}: expected {expected}, found {settings.get(name)!r}")

        size, crop = sides("size"), sides("crop_size")
        if crop and crop.get("height") != crop.get("width"):
            refuse("crop_size", "a square")
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if not settings.get(name, True):
                refuse(name, "true")
        if abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            refuse("rescale_factor", "1/255")
        resample = settings.get("resample", 3)
        if resample not in (2, 3):
            refuse("resample", "2 (bilinear) or 3 (bicubic)")
        fields: dict[str, Any] = {
            "interpolation": "bilinear" if resample == 2 else "bicubic",
            "mean": tuple(settings.get("image_mean", CLIP_MEAN)),
            "std": tuple(settings.get("image_std", CLIP_STD)),
        }
        if settings.get("do_pad") or settings.get("tove_fit"):
            fields["fit"] = settings.get("tove_fit") or "pad"
        if set(size) == {"height", "width"} and size["height"] == size["width"]:
            return cls(size["height"], **{"fit": "squash", **fields})
        if set(size) != {"shortest_edge"}:
            refuse("size", "shortest_edge, or equal height and width")
        side = crop["height"] if crop and settings.get("do_center_crop", True) else size["shortest_edge"]
        if side != size["shortest_edge"]:
            fields["resize"] = size["shortest_edge"]
        return cls(side, **fields)

    @classmethod
    def of_student(cls, student: StudentConfig) -> View:
        """Returns the view that a student's settings describe."""
        return cls(size=student.image_size, **dataclasses.asdict(student.view))

    def describe(self) -> dict[str, Any]:
        """Returns the plain, JSON-ready fields, as a manifest stores them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def key(self) -> str:
        """Returns a short hash of every field: two views with one key give the same pixels."""
        text = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def flipped(self) -> View:
        """Returns the same view of the mirrored picture."""
        return dataclasses.replace(self, flip=not self.flip)

    def cut(self, image: np.ndarray) -> np.ndarray:
        """Cuts and scales one picture, on the host.

        Args:
          image: uint8 (H, W, 3), RGB.

        Returns:
          uint8 (size, size, 3), RGB, contiguous.

        Raises:
          InputError: not uint8 (H, W, 3), or a side of zero.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise InputError(f"picture: expected uint8 (height, width, 3), found {image.dtype} {image.shape}")
        if self.flip:
            image = image[:, ::-1]
        picture = Image.fromarray(np.ascontiguousarray(image))
        fit = {"crop": self._crop, "letterbox": self._letterbox, "pad": self._pad, "squash": self._scale}[self.fit]
        return np.ascontiguousarray(fit(picture))

    def _scale(
        self,
        picture: Image.Image,
        wide: int = 0,
        high: int = 0,
        box: tuple[float, float, float, float] | None = None,
    ) -> np.ndarray:
        method = Image.Resampling[self.interpolation.upper()]
        return np.asarray(picture.resize((wide or self.size, high or self.size), method, box=box))

    def _crop(self, picture: Image.Image) -> np.ndarray:
        width, height = picture.size
        shorter = self.resize or self.size
        # Rounded down, as transformers does.
        high, wide = shorter * height // min(height, width), shorter * width // min(height, width)
        top, left = (high - self.size) // 2, (wide - self.size) // 2
        if high * wide > _LARGEST:
            across, down = width / wide, height / high
            box = (left * across, top * down, (left + self.size) * across, (top + self.size) * down)
            return self._scale(picture, box=box)
        return self._scale(picture, wide, high)[top : top + self.size, left : left + self.size]

    def _letterbox(self, picture: Image.Image) -> np.ndarray:
        wide, high = self._inside(picture)
        return self._on_canvas(self._scale(picture, wide, high), self._colour(0.5), 0, 0)

    def _pad(self, picture: Image.Image) -> np.ndarray:
        width, height = picture.size
        side, colour = max(height, width), self._colour(0.0)
        if side * side > _LARGEST:
            wide, high = self._inside(picture)
            top, left = (self.size - high) // 2, (self.size - wide) // 2
            return self._on_canvas(self._scale(picture, wide, high), colour, top, left)
        canvas = Image.new("RGB", (side, side), colour)
        canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
        return self._scale(canvas)

    def _inside(self, picture: Image.Image) -> tuple[int, int]:
        """Returns width and height of the picture with its longer side scaled to `size` (SAM's rounding)."""
        width, height = picture.size
        ratio = self.size / max(height, width)
        return max(1, int(width * ratio + 0.5)), max(1, int(height * ratio + 0.5))

    def _on_canvas(self, pixels: np.ndarray, colour: tuple[int, ...], top: int, left: int) -> np.ndarray:
        result = np.full((self.size, self.size, 3), colour, np.uint8)
        result[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        return result

    def _colour(self, rounding: float) -> tuple[int, ...]:
        """Returns the mean as an RGB colour; LLaVA rounds it down, the nearest is closest to zero."""
        levels = [min(255, max(0, int(255 * mean / self.scale + rounding))) for mean in self.mean]
        return tuple(levels if self.channels == "rgb" else levels[::-1])

    def normalize(self, pixels: Any) -> Any:
        """Normalises cut pixels; works on NumPy and JAX arrays, so also inside jit.

        Args:
          pixels: uint8 (..., size, size, 3), RGB.

        Returns:
          float32 of the same shape, channels in the order of ``channels``.
        """
        values = pixels.astype(np.float32) * np.float32(self.scale / 255.0)
        if self.channels == "bgr":
            values = values[..., ::-1]
        return (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
