"""An ONNX file as an expert: ``onnx:model.onnx``, run by ONNX runtime on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.config.specs import ForeignSpec
from tove_jax.errors import InputError
from tove_jax.experts import foreign, onnx_session
from tove_jax.experts.base import Expert
from tove_jax.files.weights import hash_file
from tove_jax.hf.load import read_json

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


def load(spec: ForeignSpec, *, weights: Path | None = None, size: int | None = None, threads: int = 1) -> Expert:
    """Loads an ONNX file.

    Beside it lies its name with ``.json`` behind, an object with the settings of
    `tove_jax.experts.foreign.read_settings`. The size may be left out where the file's input has one. The
    model has one input, (B, 3, S, S) or (B, S, S, 3), float32, float16, or uint8 for pixels that are not
    normalised. ``outputs`` names what holds the patches, and the summary if any, among the file's outputs or inner
    tensors; a single output needs no name. Maps are (B, D, H, W), or (B, H, W, D) where the input's channels
    come last.

    Args:
      spec: with the file as source.
      weights: another file.
      size: pixels a side, where it is not the file's or the settings' own.
      threads: that ONNX runtime may use for one batch.

    Raises:
      InputError: onnxruntime is not installed; no such file, or none of ONNX; settings or names that do not fit.
    """
    path = Path(weights or spec.source).expanduser()
    if not path.is_file():
        raise InputError(f"expert {spec.name}: {path}: expected an ONNX file, found none")
    beside = path.with_name(path.name + ".json")
    content = path.read_bytes()
    session = onnx_session.open_session(content, str(path), threads)
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in _DTYPES or len(inputs[0].shape) != 4 or 3 not in inputs[0].shape[1::2]:
        told = ", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in inputs)
        raise InputError(f"{path}: expected one input (B, 3, S, S) or (B, S, S, 3) of pictures, found {told}")
    first = inputs[0].shape[1] == 3
    high, wide = inputs[0].shape[2:] if first else inputs[0].shape[1:3]
    own = high if isinstance(high, int) else wide if isinstance(wide, int) else None
    values = read_json(beside) if beside.is_file() else {}
    settings = foreign.read_settings(values, str(beside), size=size if own is None else own).sized(size)
    side = settings.view.size
    if any(isinstance(length, int) and length != side for length in (high, wide)):
        raise InputError(f"{path}: its input is {high} x {wide}, but the view's size is {side}")

    names = [output.name for output in session.get_outputs()]
    wanted = dict(settings.outputs)
    if not wanted:
        if len(names) != 1:
            raise InputError(
                f"{beside}: outputs: expected the name of the patches among {', '.join(names)}, found none"
            )
        wanted = {"patches": names[0]}
    inner = [name for name in wanted.values() if name not in names]
    for name in inner:
        content = onnx_session.with_output(content, name)
    if inner:
        session = onnx_session.open_session(content, f"{path}: with outputs {', '.join(inner)}", threads)
    dtype, fixed = _DTYPES[inputs[0].type], inputs[0].shape[0]

    def call(pixels: np.ndarray) -> list[np.ndarray]:
        return session.run(list(wanted.values()), {inputs[0].name: pixels})

    def run(pixels: np.ndarray) -> dict[str, Any]:
        if dtype == np.uint8:
            pixels = pixels.transpose(0, 3, 1, 2) if first else pixels
        else:
            pixels = pixels if first else pixels.transpose(0, 2, 3, 1)
        pixels = np.ascontiguousarray(pixels, dtype)
        if not isinstance(fixed, int):
            return dict(zip(wanted, call(pixels), strict=True))
        # The file takes so many pictures and no other number: filled up with the last one.
        rows, parts = len(pixels), []
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], -rows % fixed, 0)])
        for start in range(0, len(pixels), fixed):
            parts.append(call(pixels[start : start + fixed]))
        return {
            name: np.concatenate(found)[:rows] for name, found in zip(wanted, zip(*parts, strict=True), strict=True)
        }

    return foreign.make_expert(spec, settings, run, hash_file(path), raw=dtype == np.uint8, channels_first=first)
