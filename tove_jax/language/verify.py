"""Proves that a LLaVA folder gives the same logits and tokens in JAX and in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tove_jax.data.anyres import Anyres
from tove_jax.data.conversation import IMAGE, IMAGE_ID
from tove_jax.errors import InputError
from tove_jax.files.weights import find_weights, hash_file
from tove_jax.hf.llava import load
from tove_jax.hf.llava_config import Extras, auto_map
from tove_jax.hf.verify import TOLERANCE, VerifyReport, foreign_code, photographs
from tove_jax.language.decode import Decoding
from tove_jax.language.generate import generate
from tove_jax.models.llava import Llava

_QUESTION = "What is this?"
_TIE = 1e-4  # two best logits that are nearer than this may change places by rounding


def verify_llava(
    folder: Path | str, pictures: Sequence[np.ndarray] | None = None, *, new_tokens: int = 8
) -> VerifyReport:
    """Loads a whole model in JAX and, where torch is installed, in transformers, and compares in float32.

    Compared are logits and greedily written tokens of three rows (a picture, two pictures, text alone), which the
    folder's own processor makes, and its pixels. Both models are held at once. Code in the folder is run only when it
    is the same, byte for byte, as this package's.

    Args:
      folder: in transformers' layout, see `tove_jax.hf.llava_export.export`.
      pictures: two of uint8 (H, W, 3); scikit-image's photographs when None and it is installed, else noise.
      new_tokens: how many are written.

    Returns:
      The report; ``report.ok`` is whether all agreed.

    Raises:
      InputError: no such folder, weights that do not fit, a tokenizer without the image token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    model, params, extras = load(folder, store=np.float32)
    if extras.described.layout != "transformers":
        raise InputError(f"{folder}: expected transformers' layout; import the folder first (tove import)")
    report = VerifyReport(folder, find_weights(folder))
    report.file_hash = hash_file(report.file)
    tokenizer = extras.tokenizer()
    image = extras.image_token
    if tokenizer.inner.convert_tokens_to_ids(IMAGE) != image:
        raise InputError(f"{folder}: expected a tokenizer with {IMAGE} as id {image}, found none or another id")
    chosen = list(photographs() if pictures is None else pictures)[:2]
    chosen += [np.random.RandomState(n).randint(0, 256, (40, 60, 3), np.uint8) for n in range(2 - len(chosen))]
    inputs, reference = _theirs(report, extras, chosen)
    if reference is None:
        return report
    ids = np.asarray(inputs["input_ids"])
    mask, ids = np.asarray(inputs["attention_mask"], bool), np.where(ids == image, IMAGE_ID, ids).astype(np.int32)
    pixels, index = _pixels(model, extras, [[chosen[0]], chosen, []])
    _compare_pixels(report, extras, chosen, np.asarray(inputs["pixel_values"]))
    decoding = Decoding(new_tokens=new_tokens, pad=0)

    @jax.jit
    def run(params: Any, pixels: Any, ids: Any, index: Any, mask: Any) -> Any:
        merged = model.embeddings(params, pixels, ids, index=index)
        result: Any = model.decoder.apply({"params": params["language"]["model"]}, embeddings=merged, mask=mask)
        return merged, result[0]

    with jax.default_matmul_precision("highest"):
        merged, logits = run(params, pixels, ids, index, mask)
        written = generate(
            model.decoder, params["language"]["model"], embeddings=merged, mask=mask, decoding=decoding
        ).tokens
    _compare(report, np.asarray(logits), np.asarray(written), mask, *_run(reference, inputs, new_tokens))
    return report


def _pixels(model: Llava, extras: Extras, pictures: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray | None]:
    view = extras.view
    if isinstance(view, Anyres):
        sizes = [[(picture.shape[0], picture.shape[1]) for picture in row] for row in pictures]
        tiles = max(sum(map(view.tiles, row)) for row in sizes)
        length = max(sum(map(view.count, row)) for row in sizes)
        stacked = np.stack([view.stack(row, tiles=tiles) for row in pictures])
        index = np.stack([view.index(row, tiles=tiles, length=length) for row in sizes])
        return view.view.normalize(stacked), index
    most, size = max(map(len, pictures)), model.tower.image_size
    stacked = np.zeros((len(pictures), most, size, size, 3), np.float32)
    for number, row in enumerate(pictures):
        for place, picture in enumerate(row):
            stacked[number, place] = view.normalize(view.cut(picture))
    return stacked, None


def _theirs(report: VerifyReport, extras: Extras, pictures: list[np.ndarray]) -> tuple[Any, Any]:
    """Returns the inputs that the folder's processor makes, and transformers' model."""
    try:
        import torch
        import transformers
    except ImportError as error:
        report.not_run = f"{error.name} is not installed"
        return None, None
    kind = extras.student.adapter.kind
    remote = kind != "none"
    if remote:
        names = [f"{what}_{kind}_{part}.py" for what in ("configuration", "modeling") for part in ("clip", "llava")]
        if foreign := foreign_code(report.folder, names, auto_map(kind)):
            report.problems += [f"{what}: its code was not run" for what in foreign]
            report.not_run = "the folder's code is not this package's"
            return None, None
    name = str(report.folder.resolve())
    tiles = isinstance(extras.view, Anyres)
    try:
        processor = (transformers.LlavaNextProcessor if tiles else transformers.LlavaProcessor).from_pretrained(
            name, local_files_only=True, trust_remote_code=remote
        )
        loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            name,
            trust_remote_code=remote,
            local_files_only=True,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
        from PIL import Image

        images = [Image.fromarray(picture) for picture in pictures]
        texts = [_prompt(processor, count) for count in (1, 2, 0)]
        inputs = processor(
            images=[images[0], *images], text=texts, return_tensors="pt", padding=True, padding_side="left"
        )
    except Exception as error:  # whatever a user of the folder would meet
        report.problems.append(f"transformers {transformers.__version__} cannot load the folder: {error}")
        return None, None
    model, info = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        strangers = [str(key) for key in info[what] if "position_ids" not in str(key)]
        if strangers:
            report.problems.append(f"transformers reports {what}: {', '.join(sorted(strangers)[:5])}")
    return inputs, model.eval()


def _prompt(processor: Any, pictures: int) -> str:
    if not processor.chat_template:
        return f"{IMAGE}\n" * pictures + _QUESTION
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": _QUESTION}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _run(reference: Any, inputs: Any, new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    import torch

    with torch.no_grad():
        logits = reference(**inputs).logits.numpy()
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        reference.generation_config.eos_token_id = None
        written = reference.generate(**inputs, max_new_tokens=new_tokens, **options).numpy()
    return logits, written[:, inputs["input_ids"].shape[1] :]


def _compare_pixels(report: VerifyReport, extras: Extras, pictures: list[np.ndarray], theirs: np.ndarray) -> None:
    view = extras.view
    theirs = np.moveaxis(theirs, -3, -1)[1:]  # the first picture comes twice
    for picture, found in zip(pictures, theirs, strict=True):
        if isinstance(view, Anyres):
            cut = view.view.normalize(view.cut(picture))
            found = found[: len(cut)]
        elif view.fit == "letterbox":
            report.notes.append("pictures are letterboxed, which the image processor does not do: not compared")
            return
        else:
            cut = view.normalize(view.cut(picture))
        difference = float(np.abs(cut - found).max()) if cut.shape == found.shape else np.inf
        known = report.differences.get("image processor's pixels", 0.0)
        report.differences["image processor's pixels"] = max(difference, known)
        if not difference <= TOLERANCE:
            report.problems.append(f"the image processor's pixels differ by {difference:.2e}")


def _compare(
    report: VerifyReport,
    ours: np.ndarray,
    written: np.ndarray,
    mask: np.ndarray,
    theirs: np.ndarray,
    their_tokens: np.ndarray,
) -> None:
    if ours.shape != theirs.shape:
        report.problems.append(f"logits of other shapes: {ours.shape} and {theirs.shape}")
        return
    difference = np.abs(ours - theirs)[mask]
    scaled = difference / np.maximum(1, np.abs(theirs[mask]))
    report.differences["logits"] = float(difference.max())
    if not scaled.max() <= TOLERANCE:  # NaN is bad
        report.problems.append(f"logits differ by {difference.max():.2e}, tolerance {TOLERANCE:g}")
    for row, (mine, other) in enumerate(zip(written, their_tokens, strict=True)):
        if np.array_equal(mine, other):
            continue
        first = int(np.argmax(mine != other))
        text = f"greedy tokens of row {row} differ from the {first + 1}. on: {mine.tolist()} and {other.tolist()}"
        best = np.sort(theirs[row, -1])[-2:]
        near = first == 0 and best[1] - best[0] < _TIE
        (report.notes if near else report.problems).append(text)
    report.notes.append(f"greedy tokens compared: {written.size}")
