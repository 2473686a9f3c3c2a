"""Proves that an exported folder gives the numbers it should, in JAX and in transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tove_jax.config.schema import StudentConfig
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.files.weights import find_weights, hash_arrays, hash_file, read_arrays
from tove_jax.hf import rules
from tove_jax.hf.export import AUTO_MAP, HASH_KEY, REMOTE_CODE, remote_code
from tove_jax.hf.load import import_student, read_json
from tove_jax.models import vit

TOLERANCE = 1e-4
_TIE = 1e-5


@dataclasses.dataclass
class VerifyReport:
    """What `verify` found.

    Attributes:
      folder: the folder.
      file: the weights file.
      file_hash: sha256 of that file's bytes.
      arrays_hash: `tove_jax.files.weights.hash_arrays` of its arrays.
      differences: output name to largest absolute difference between JAX and transformers; empty
        where transformers was not run.
      not_run: why transformers was not run, or None.
      notes: facts worth knowing that are no fault.
      problems: what is wrong; empty when all is well.
    """

    folder: Path
    file: Path
    file_hash: str = ""
    arrays_hash: str = ""
    differences: dict[str, float] = dataclasses.field(default_factory=dict)
    not_run: str | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems

    def lines(self) -> list[str]:
        """Returns the report as text, a line a fact."""
        lines = [
            f"folder        {self.folder}",
            f"file          {self.file.name}",
            f"file sha256   {self.file_hash}",
        ]
        if self.arrays_hash:
            lines.append(f"weights hash  {self.arrays_hash}")
        for name, value in self.differences.items():
            lines.append(f"difference    {name}: {value:.2e}")
        lines += [f"note          {note}" for note in self.notes]
        lines += [f"PROBLEM       {problem}" for problem in self.problems]
        if not self.ok:
            lines.append("FAILED")
        elif self.not_run is None:
            lines.append(f"ok: JAX and transformers agree to {TOLERANCE:g} in float32 (relative beyond 1)")
        else:
            lines.append(f"ok, but only the JAX side was checked: {self.not_run}")
        return lines


def verify(
    folder: Path | str,
    params: Mapping[str, Any] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
) -> VerifyReport:
    """Loads an exported folder in JAX and, where torch is installed, in transformers, and compares.

    Compared in float32 on random pixels and on pictures: every hidden state, the pooled output, the
    row of CLS of the second last layer's attention, and the image processor's pixels. Code in the
    folder is run only when it is the same, byte for byte, as this package's.

    Args:
      folder: a local folder as `tove_jax.hf.export.export_student` writes, or any CLIP.
      params: parameters that the folder must hold bit for bit, where they are at hand.
      pictures: uint8 (H, W, 3) RGB, at most four are used; scikit-image's photographs when None and
        it is installed.

    Returns:
      The report; ``report.ok`` is whether all agreed.

    Raises:
      InputError: no such folder, or weights missing, unknown or of another shape.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    report = VerifyReport(folder, find_weights(folder))
    fields, loaded = import_student(folder)
    student = StudentConfig(**fields)
    _check_hashes(report)
    if params is not None:
        _check_params(report, loaded, params)
    pictures = list(photographs() if pictures is None else pictures)[:4]
    size = student.image_size
    preprocessor = folder / "preprocessor_config.json"
    view = View.of_student(student)
    if preprocessor.is_file():
        view = View.from_preprocessor(read_json(preprocessor), str(preprocessor))
    if view.size != size:
        report.notes.append(f"the image processor gives {view.size} pixels a side, the model takes {size}")
        view, pictures = View.of_student(student), []
    noise = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    cut = [view.normalize(view.cut(picture))[None] for picture in pictures]
    pixels = np.concatenate([noise, *cut])
    ours, margins = _run_jax(student, loaded, pixels)
    for name, value in ours.items():
        if not np.isfinite(value).all():
            report.problems.append(f"{name}: not finite in JAX")
    theirs = _run_transformers(report, student, pixels, pictures, pixels[2:])
    if theirs is not None:
        _compare(report, ours, theirs, margins)
    return report


def _check_hashes(report: VerifyReport) -> None:
    report.file_hash = hash_file(report.file)
    report.arrays_hash = hash_arrays(read_arrays(report.file))
    if report.file.suffix != ".safetensors":
        return
    from safetensors import safe_open

    with safe_open(report.file, framework="np") as file:
        recorded = (file.metadata() or {}).get(HASH_KEY)
    if recorded is None:
        report.notes.append("the file records no weights hash: not written by tove export")
    elif recorded != report.arrays_hash:
        report.problems.append(f"weights hash: the file records {recorded}, its arrays have {report.arrays_hash}")


def _check_params(report: VerifyReport, loaded: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    found, wanted = rules.flatten(loaded), rules.flatten(params)
    for path in sorted({*found, *wanted}):
        if path not in found or path not in wanted:
            report.problems.append(f"{path}: only in the {'folder' if path in found else 'given parameters'}")
        elif not np.array_equal(found[path], np.asarray(wanted[path], np.float32)):
            report.problems.append(f"{path}: differs from the given parameters")


def photographs() -> list[np.ndarray]:
    """Returns two of scikit-image's photographs, uint8 (H, W, 3), or none where it is not installed."""
    try:
        from skimage import data

        return [data.astronaut(), data.coffee()]
    except Exception:  # not installed, or its pictures are not on this machine
        return []


def _run_jax(
    student: StudentConfig, params: Mapping[str, Any], pixels: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Returns our outputs under transformers' names, and each picture's closest call of a top-1 router."""
    module = vit.from_config(student)
    layers = [f"layers/{i}" for i in range(student.layers)]
    row = f"layers/{max(student.layers - 2, 0)}/attention_cls"
    wanted = ["embeddings", *layers, row, "pooled"]
    adapter, routers = student.adapter, []
    if adapter.kind == "mole" and adapter.routing == "top1" and adapter.experts > 1:
        routers = ["adapter/router_probs"]
    if adapter.kind == "mola":
        counts = {"teacher": adapter.teacher_experts, "general": adapter.general_experts}
        routers = [f"adapter/router_{group}_probs" for group, count in counts.items() if count > 1]
    wanted += routers

    @jax.jit
    def run(tree: Any, x: Any) -> Any:
        return module.apply({"params": tree}, x, intermediates=tuple(wanted))

    with jax.default_matmul_precision("highest"):
        last, found = jax.device_get(run(params, pixels))
    outputs = {f"hidden_states[{i}]": found[name] for i, name in enumerate(["embeddings", *layers])}
    outputs |= {"last_hidden_state": last, "pooler_output": found["pooled"], "attentions[-2] of CLS": found[row]}
    if not routers:
        return outputs, None
    ranked = [np.sort(found[name], axis=-1) for name in routers]
    return outputs, np.min([(one[..., -1] - one[..., -2]).min(axis=(0, 2)) for one in ranked], axis=0)


def _run_transformers(
    report: VerifyReport, student: StudentConfig, pixels: np.ndarray, pictures: list[np.ndarray], cut: np.ndarray
) -> dict[str, np.ndarray] | None:
    try:
        import torch
        import transformers
    except ImportError as error:
        report.not_run = f"{error.name} is not installed"
        return None
    remote = student.adapter.kind != "none"
    own = student.adapter.kind
    if remote and (foreign := foreign_code(report.folder, REMOTE_CODE[own], AUTO_MAP[own])):
        report.problems += [f"{what}: its code was not run" for what in foreign]
        report.not_run = "the folder's code is not this package's"
        return None
    name = str(report.folder.resolve())
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModel.from_pretrained(
            name,
            trust_remote_code=remote,
            local_files_only=True,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
        processor = None
        if pictures:
            processor = transformers.AutoImageProcessor.from_pretrained(
                name, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # whatever a user of the folder would meet
        report.problems.append(f"transformers {transformers.__version__} cannot load the folder: {error}")
        return None
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        strangers = [str(key) for key in info[kind] if "position_ids" not in str(key)]
        if strangers and hasattr(model, "encoder"):
            report.problems.append(f"transformers reports {kind}: {', '.join(sorted(strangers)[:5])}")
    tower = getattr(model, "vision_model", model)
    with torch.no_grad():
        batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        out = tower.eval()(batch, output_hidden_states=True, output_attentions=True)
    theirs = {f"hidden_states[{i}]": state.numpy() for i, state in enumerate(out.hidden_states)}
    theirs["last_hidden_state"] = out.last_hidden_state.numpy()
    theirs["pooler_output"] = out.pooler_output.numpy()
    theirs["attentions[-2] of CLS"] = out.attentions[max(student.layers - 2, 0)][:, :, 0].numpy()
    if processor is not None and student.view.fit in ("crop", "squash"):
        from PIL import Image

        images = [Image.fromarray(picture) for picture in pictures]
        values = np.asarray(processor(images=images, return_tensors="np")["pixel_values"])
        difference = float(np.abs(values.transpose(0, 2, 3, 1) - cut).max())
        report.differences["image processor's pixels"] = difference
        if difference > TOLERANCE:
            report.problems.append(f"the image processor's pixels differ by {difference:.2e}")
    return theirs


def foreign_code(folder: Path, names: Sequence[str], auto_map: Mapping[str, str]) -> list[str]:
    """Returns what in the folder would lead transformers to run code that is not ours.

    Args:
      folder: with config.json.
      names: the files that it must hold as this package has them.
      auto_map: what config.json must say of them.
    """
    foreign = []
    for name in names:
        path = folder / name
        if not path.is_file():
            foreign.append(f"{name} is missing; expected that of this package")
        elif path.read_bytes() != remote_code(name):
            foreign.append(f"{name} differs from this package")
    found = read_json(folder / "config.json").get("auto_map")
    if found != auto_map:
        foreign.append(f"config.json: auto_map is {found}, expected {auto_map}")
    return foreign


def _compare(
    report: VerifyReport,
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    margins: np.ndarray | None,
) -> None:
    odd = [name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape]
    if odd or len(theirs) != len(ours):
        report.problems.append(f"outputs of other shapes or numbers: {', '.join(odd) or len(theirs)}")
        return
    # Beyond 1 the tolerance is relative: CLIP has channels in the hundreds, where float32 ends at 1e-5.
    scaled = {name: np.abs(ours[name] - theirs[name]) / np.maximum(1, np.abs(ours[name])) for name in ours}
    per_picture = np.max([value.reshape(len(value), -1).max(axis=1) for value in scaled.values()], axis=0)
    bad = ~(per_picture <= TOLERANCE)  # NaN is bad
    keep = np.ones(len(bad), bool)
    if margins is not None and not bad.all():
        # Rounding decides a router that is as good as tied, and one token's other choice moves the picture.
        keep = ~(bad & (margins < _TIE))
        for index in np.flatnonzero(~keep):
            report.notes.append(f"picture {index} left out: a router's two best differ by {margins[index]:.1e} only")
    for name in ours:
        report.differences[name] = difference = float(np.abs(ours[name][keep] - theirs[name][keep]).max())
        if not scaled[name][keep].max() <= TOLERANCE:
            report.problems.append(f"{name} differs by {difference:.2e}, tolerance {TOLERANCE:g}")
