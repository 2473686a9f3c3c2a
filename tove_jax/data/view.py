"""A view: how a picture is cut and scaled before a network sees it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

import numpy as np
from PIL import Image

from tove_jax.config.schema import StudentConfig
from tove_jax.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Fit = Literal["crop", "letterbox", "pad", "squash"]


@dataclasses.dataclass(frozen=True)
class View:
    """Size, crop, interpolation, flip and normalisation of the picture one network sees.

    Attributes:
      size: height and width of the result, pixels.
      fit: ``crop`` scales the shorter side to ``size`` and cuts the centre; ``letterbox`` scales
        the longer side and pads right and bottom with the mean colour, which normalisation turns
        into zero to within half a level (SAM); ``pad`` pads to a centred square with the mean
        colour, then scales (LLaVA, stage 2); ``squash`` ignores the aspect ratio.
      interpolation: Pillow's filter.
      mean, std: per channel, for values in [0, scale], in the order of ``channels``.
      channels: order in which the network wants them.
      scale: the value that 255 maps to before mean and std (1 for most; 255 for Caffe's networks).
      flip: mirror left to right, first of all.
    """

    size: int
    fit: Fit = "crop"
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    channels: Literal["rgb", "bgr"] = "rgb"
    scale: float = 1.0
    flip: bool = False

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
          uint8 (size, size, 3), RGB.

        Raises:
          InputError: not uint8 (H, W, 3), or a side of zero.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise InputError(
                f"picture: expected uint8 (height, width, 3), found {image.dtype} {image.shape}"
            )
        if self.flip:
            image = image[:, ::-1]
        height, width = image.shape[:2]
        picture = Image.fromarray(np.ascontiguousarray(image))
        method = Image.Resampling[self.interpolation.upper()]
        level = [round(255 * m / self.scale) for m in self.mean]
        colour = tuple(level if self.channels == "rgb" else level[::-1])
        if self.fit == "squash":
            return np.asarray(picture.resize((self.size, self.size), method))
        if self.fit == "pad":
            side = max(height, width)
            canvas = Image.new("RGB", (side, side), colour)
            canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
            return np.asarray(canvas.resize((self.size, self.size), method))
        if self.fit == "letterbox":
            high, wide = self._letterbox_shape(height, width)
            result = np.full((self.size, self.size, 3), colour, np.uint8)
            result[:high, :wide] = np.asarray(picture.resize((wide, high), method))
            return result
        if height <= width:
            high, wide = self.size, max(self.size, int(self.size * width / height))
        else:
            high, wide = max(self.size, int(self.size * height / width)), self.size
        scaled = np.asarray(picture.resize((wide, high), method))
        top, left = (high - self.size) // 2, (wide - self.size) // 2
        return scaled[top : top + self.size, left : left + self.size]

    def _letterbox_shape(self, height: int, width: int) -> tuple[int, int]:
        ratio = self.size / max(height, width)
        return max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5))

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
