"""Writes students as Hugging Face folders that transformers loads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.config.schema import Config, StudentConfig
from tove_jax.errors import InputError
from tove_jax.files.atomic import atomic_folder, atomic_write_bytes, atomic_write_json
from tove_jax.files.weights import hash_arrays
from tove_jax.hf import clip, encoder_adapters, rules
from tove_jax.hf.card import RANDOM_START, model_card
from tove_jax.hf.load import MODEL_TYPES

HASH_KEY = "tove_hash"
REMOTE_CODE = {kind: (f"configuration_{kind}_clip.py", f"modeling_{kind}_clip.py") for kind in MODEL_TYPES}
_CLASSES = {"mole": "MoleCLIPVision", "mola": "MolaCLIPVision"}
AUTO_MAP = {
    kind: {"AutoConfig": f"configuration_{kind}_clip.{name}Config", "AutoModel": f"modeling_{kind}_clip.{name}Model"}
    for kind, name in _CLASSES.items()
}
_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "__pycache__"}
_FILES |= {f"{encoder_adapters.FILE}.safetensors"}
_FILES |= {name for names in REMOTE_CODE.values() for name in names}
_SUFFIXES = (".safetensors", ".bin")
WHOLE_MODEL = "model.vision_tower.vision_tower.vision_model."
"""Where the tower's names begin in the whole language model, as the released code saves and loads them."""
_FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def hf_config(student: StudentConfig) -> dict[str, Any]:
    """Returns config.json of a student: `CLIPVisionModel`'s, or with LoRA experts our remote code's."""
    kind = student.adapter.kind
    plain = kind == "none"
    config: dict[str, Any] = {
        "architectures": ["CLIPVisionModel" if plain else f"{_CLASSES[kind]}Model"],
        "model_type": "clip_vision_model" if plain else MODEL_TYPES[kind],
        "dtype": "float32",
        "hidden_size": student.width,
        "intermediate_size": student.mlp_width,
        "num_hidden_layers": student.layers,
        "num_attention_heads": student.heads,
        "num_channels": 3,
        "image_size": student.image_size,
        "patch_size": student.patch_size,
        "hidden_act": student.activation,
        "layer_norm_eps": student.norm_epsilon,
        "attention_dropout": 0.0,
    }
    layer = int(student.feature.removeprefix("layers/"))
    config["vision_feature_layer"] = layer if layer < 0 else layer + 1  # transformers: the embedding is 0
    if not plain:
        config |= {"auto_map": AUTO_MAP[kind], "adapter": dataclasses.asdict(student.adapter)}
    return config


def hf_preprocessor(student: StudentConfig) -> dict[str, Any]:
    """Returns preprocessor_config.json: `CLIPImageProcessor`'s fields, equal to the student's view.

    That processor knows ``crop`` and ``squash``; for ``pad`` and ``letterbox`` it is given ``squash``, right
    for pictures brought to a square beforehand, and ``tove_fit`` says so.
    """
    size, view = student.image_size, student.view
    square = {"height": size, "width": size}
    crop = view.fit == "crop"
    fields: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if crop else square,
        "resample": _FILTERS[view.interpolation],
        "do_center_crop": crop,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(view.mean),
        "image_std": list(view.std),
    }
    if view.fit in ("pad", "letterbox"):
        fields["tove_fit"] = view.fit
    return fields


def hf_arrays(student: StudentConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the weights under their published names, float32.

    A plain tower is written with ``vision_model.`` before every name, which transformers of every release
    loads; with LoRA experts the names are those of our remote code, without it.

    Raises:
      InputError: parameters that do not fit the settings.
    """
    expected = clip.shapes(student)
    leaves = rules.flatten(params)
    found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    wrong = [
        f"{path}: found {found.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
        for path in sorted({*expected, *found})
        if found.get(path) != expected.get(path)
    ]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"student parameters do not fit the settings: {'; '.join(wrong[:8])}{more}")
    arrays = rules.to_arrays({path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()}, clip.RULES)
    prefix = "vision_model." if student.adapter.kind == "none" else ""
    return {prefix + name: array for name, array in arrays.items()}


def remote_code(name: str) -> bytes:
    """Returns the content of one of `REMOTE_CODE`, as exports carry it."""
    return (Path(__file__).parent / "remote_code" / name).read_bytes()


def export_student(
    config: Config,
    params: Mapping[str, Any],
    folder: Path | str,
    *,
    provenance: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Any] | None = None,
) -> None:
    """Writes a student as a Hugging Face folder, whole or not at all.

    Holds config.json, model.safetensors (float32), preprocessor_config.json and README.md. Without LoRA
    experts it is a plain `CLIPVisionModel`; with them it carries its modelling file, for
    ``AutoModel.from_pretrained(folder, trust_remote_code=True)``.

    Args:
      config: settings of the run.
      params: the student's parameter tree.
      folder: target; an earlier export there is replaced, any other content is refused.
      provenance: what the model card tells, see `tove_jax.hf.card.model_card`.
      adapters: MoVE-KD's encoder adapters, for a further stage that begins from the folder; written as
        ``encoder_adapter.safetensors``. The deployed encoder does not need them.

    Raises:
      InputError: parameters that do not fit, a folder with other files, or one that cannot be written.
    """
    _write(config.student, params, Path(folder), lambda hashed: model_card(config, hashed, provenance or {}), adapters)


def save_start(config: Config, params: Mapping[str, Any], folder: Path | str) -> None:
    """Writes the student's start as a plain CLIP folder, without LoRA experts.

    The ``clip`` expert and ``student.initialize`` read it with `tove_jax.hf.load.load_clip`. Its card says so
    when the weights are random.

    Args:
      config: settings of the run; without ``student.initialize`` the weights were drawn with ``train.seed``.
      params: the student's parameter tree; a subtree ``layers/mlp/adapter`` is left out.
      folder: target, as for `export_student`.

    Raises:
      InputError: as `export_student`.
    """
    leaves = {path: leaf for path, leaf in rules.flatten(params).items() if "/adapter/" not in path}

    drawn = "" if config.student.initialize else f" {RANDOM_START.format(config.train.seed)}"

    def card(hashed: str) -> str:
        return (
            "---\nlibrary_name: transformers\n---\n\n"
            f"# {config.title or 'Student'}: its start\n\nThe CLIP vision tower before distillation, "
            f"written by tove_jax.{drawn} Weights hash `{hashed}`.\n"
        )

    _write(clip.without_adapter(config.student), rules.unflatten(leaves), Path(folder), card)


def _refuse_others(folder: Path, ours: Iterable[str]) -> None:
    """Refuses a folder that holds more than an earlier export, since all of it would be replaced."""
    if folder.is_dir():
        strangers = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours)
        if strangers:
            raise InputError(
                f"{folder}: expected an empty folder or an earlier export, found {', '.join(strangers[:5])}"
            )


def _write(
    student: StudentConfig,
    params: Mapping[str, Any],
    folder: Path,
    card: Any,
    adapters: Mapping[str, Any] | None = None,
) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    _refuse_others(folder, _FILES)
    arrays = hf_arrays(student, params)
    hashed = hash_arrays(arrays)
    with atomic_folder(folder) as temporary:
        try:
            save_file(arrays, temporary / "model.safetensors", metadata={"format": "pt", HASH_KEY: hashed})
        except SafetensorError as error:
            raise InputError(f"{folder}: cannot be written: {error}") from error
        _sort_metadata(temporary / "model.safetensors")
        atomic_write_json(temporary / "config.json", hf_config(student))
        atomic_write_json(temporary / "preprocessor_config.json", hf_preprocessor(student))
        if student.adapter.kind != "none":
            for name in REMOTE_CODE[student.adapter.kind]:
                atomic_write_bytes(temporary / name, remote_code(name))
        atomic_write_bytes(temporary / "README.md", card(hashed).encode())
        if adapters:
            export_encoder_adapters(adapters, temporary / f"{encoder_adapters.FILE}.safetensors")


def _sort_metadata(path: Path) -> None:
    """Puts a safetensors file's metadata in order: the library's is random, and equal exports would differ."""
    with open(path, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise ValueError(f"{path}: header of {size} bytes would become {len(text)}")
        stream.seek(8)
        stream.write(text)


def export_mole_encoder(student: StudentConfig, params: Mapping[str, Any], path: Path | str, prefix: str = "") -> None:
    """Writes the tower and its MoLE under the names of MoVE-KD's released adapter file.

    Args:
      student: settings, with LoRA experts of kind ``mole``.
      params: the student's parameter tree.
      path: ``.safetensors``, or ``.bin`` where torch is installed (the released file is a ``.bin``).
      prefix: put before every name, such as `WHOLE_MODEL`, which the released code's own loader expects.

    Raises:
      InputError: no LoRA experts, another suffix, ``.bin`` without torch, or a path that cannot be written.
    """
    if student.adapter.kind != "mole":
        what = "no LoRA experts" if student.adapter.kind == "none" else f"LoRA experts of kind '{student.adapter.kind}'"
        raise InputError(f"{path}: the student has {what}, so there is no adapter file of MoVE-KD to write")
    arrays = clip.released(hf_arrays(student, params))
    _write_arrays({prefix + name: array for name, array in arrays.items()}, Path(path))


def export_encoder_adapters(params: Mapping[str, Any], path: Path | str) -> None:
    """Writes MoVE-KD's encoder adapters under the names of the released ``encoder_adapter.bin``.

    Args:
      params: MoVE-KD's method parameters, ``{expert: {"channel": ..., "token": ...}}``.
      path: as for `export_mole_encoder`.

    Raises:
      InputError: as `export_mole_encoder`, or parameters that are no encoder adapters.
    """
    _write_arrays(encoder_adapters.to_arrays(params), Path(path))


def export_released(
    config: Config, params: Mapping[str, Any], folder: Path | str, *, suffix: str = ".bin", prefix: str = ""
) -> None:
    """Writes a MoVE-KD run as the released files, ``mole_encoder`` and ``encoder_adapter``, whole or not at all.

    Args:
      config: settings of the run.
      params: ``{"student", "method"}``; without encoder adapters the second file is left out.
      folder: target; earlier such files there are replaced, any other content is refused.
      suffix: ``.bin`` as released, which needs torch, or ``.safetensors``.
      prefix: see `export_mole_encoder`.

    Raises:
      InputError: another method's run, or as `export_mole_encoder`.
    """
    folder = Path(folder)
    if config.method.name != "move_kd":
        raise InputError(f"{folder}: only runs of 'move_kd' have released files, found one of '{config.method.name}'")
    _refuse_others(folder, {f"{name}{end}" for name in ("mole_encoder", encoder_adapters.FILE) for end in _SUFFIXES})
    with atomic_folder(folder) as temporary:
        export_mole_encoder(config.student, params["student"], temporary / f"mole_encoder{suffix}", prefix)
        if params.get("method"):
            export_encoder_adapters(params["method"], temporary / f"{encoder_adapters.FILE}{suffix}")


def _write_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    import io

    from safetensors.numpy import save

    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path}: expected a name that ends in {' or '.join(_SUFFIXES)}")
    if path.suffix == ".safetensors":
        atomic_write_bytes(path, save(dict(arrays), metadata={"format": "pt"}))
        return
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{path}: writing .bin needs torch, which is not installed; use .safetensors") from error
    stream = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, stream)
    atomic_write_bytes(path, stream.getvalue())
