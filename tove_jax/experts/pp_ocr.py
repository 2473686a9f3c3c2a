"""The PP-OCR text detection expert: where writing is, run on the host by ONNX runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures
from tove_jax.experts.loading import package_file, resized
from tove_jax.experts.onnx_session import open_session, with_output
from tove_jax.files.weights import hash_file

CARD = ExpertCard(
    name="pp_ocr_det",
    title="PP-OCRv6 small text detector",
    paper="Liao et al., Real-time Scene Text Detection with Differentiable Binarization, AAAI 2020, "
    "arXiv:1911.08947; PP-OCRv6 models of the PaddleOCR project",
    weights="PyPI rapidocr 3.10.0, PP-OCRv6_det_small.onnx",
    licence="Apache-2.0",
    # Published: the shorter side at least 736, both rounded to multiples of 32; the square centre
    # is ours, so that the grid covers the same picture as every other expert's.
    view=View(
        size=736,
        fit="crop",
        interpolation="bilinear",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        channels="bgr",
    ),
    grid=(46, 46),
    width=96,
    backend="host",
    checked_against="PyPI onnx 1.23.2, its reference evaluator",
    parameters=2_453_353,
)
INPUT = "x"
PROBABILITY = "fetch_name_0"
NECK = "p2o.pd_op.concat.1.0"
POOL = 4


def _session(path: Path, threads: int) -> Any:
    model = with_output(path.read_bytes(), NECK)
    session = open_session(model, str(path), threads, "the PP-OCRv6 small text detector as ONNX")
    outputs = {output.name: output.shape for output in session.get_outputs()}
    inputs = [entry.name for entry in session.get_inputs()]
    if inputs != [INPUT] or outputs.get(PROBABILITY, [0, 0])[1] != 1 or outputs[NECK][1] != CARD.width:
        raise InputError(
            f"{path}: expected the PP-OCRv6 small text detector, with input {INPUT} and outputs "
            f"{PROBABILITY} (1 channel) and {NECK} ({CARD.width} channels), found {inputs} and {outputs}"
        )
    return session


def describe(*, weights: Path | None = None, size: int | None = None, threads: int = 1) -> ExpertCard:
    """Returns the card at an input size of `size` pixels, a multiple of 32."""
    return resized(CARD, size, 32)


def load(*, weights: Path | None = None, size: int | None = None, threads: int = 1) -> Expert:
    """Loads the expert.

    Args:
      weights: a copy of the published ``.onnx``; None finds the installed package's.
      size: pixels a side, a multiple of 32; None is the card's.
      threads: threads ONNX runtime may use for one batch; one, so that several processes
        of extraction share a machine without treading on each other.

    Returns:
      An expert whose patches are the detector's fused feature pyramid (96 channels at stride 4),
      averaged over 4 x 4 cells: (B, size/16, size/16, 96); ``extras["text"]`` gives the
      probability of text at each pixel (B, size, size) in [0, 1].

    Raises:
      InputError: a package is missing, the file is not this network's, or `threads` is not positive.
    """
    card = describe(size=size)
    if not isinstance(threads, int) or threads < 1:
        raise InputError(f"expert pp_ocr_det: threads: expected a positive number, found {threads!r}")
    path = Path(weights) if weights else package_file("rapidocr", "models/PP-OCRv6_det_small.onnx", "rapidocr==3.10.0")
    digest = hash_file(path)
    session = _session(path, threads)

    def run(pixels: Any, tensor: str) -> np.ndarray:
        values = card.view.normalize(np.asarray(pixels)).transpose(0, 3, 1, 2)
        return session.run([tensor], {INPUT: np.ascontiguousarray(values)})[0]

    def apply(params: Any, pixels: Any) -> ExpertFeatures:
        neck = run(pixels, NECK)
        batch, channels, height, width = neck.shape
        cells = neck.reshape(batch, channels, height // POOL, POOL, width // POOL, POOL).mean((3, 5))
        return ExpertFeatures(patches=np.ascontiguousarray(cells.transpose(0, 2, 3, 1)))

    def text(params: Any, pixels: Any) -> np.ndarray:
        return run(pixels, PROBABILITY)[:, 0]

    return Expert(card, {}, digest, apply, {"text": text})
