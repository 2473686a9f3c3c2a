"""Reads Hugging Face folders: any CLIP vision tower, and what `tove export` wrote."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.config import door
from tove_jax.config.schema import AdapterConfig, StudentConfig, ViewConfig
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.files import mirror
from tove_jax.files.weights import read_arrays
from tove_jax.hf import clip, encoder_adapters, rules
from tove_jax.models.position import resize_position

MODEL_TYPES = {"mole": "mole_clip_vision_model", "mola": "mola_clip_vision_model"}  # by adapter.kind

# transformers' defaults, which a config.json may leave out.
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_HUB_FILES = ("config.json", "preprocessor_config.json")


def locate(folder_or_hub_id: str | Path, file: str | None = None, also: Sequence[str] = ()) -> Path:
    """Returns the folder; fetches it first when no such folder exists and the name is a hub id.

    Only here the network may be used, and only through `huggingface_hub`, whose cache and
    ``HF_HUB_OFFLINE`` apply. Safetensors are preferred; a pickled ``.bin`` is fetched where there is
    nothing else.

    Args:
      folder_or_hub_id: the folder, also of an object store, or the hub id.
      file: fetch this file, and the usual ones only where the hub has none of this name.
      also: patterns of further files to fetch with the usual ones.

    Raises:
      InputError: neither a folder nor a hub id, or the hub cannot give it.
    """
    folder = Path(mirror.located(str(folder_or_hub_id))).expanduser()
    if folder.is_dir():
        return folder
    name = str(folder_or_hub_id)
    if folder.exists() or not _HUB_ID.fullmatch(name):
        raise InputError(f"{name}: expected a folder with config.json and weights, or a hub id, found neither")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"{name}: no such folder, and as a hub id it needs huggingface_hub, which is not installed"
        ) from error
    try:
        if file is not None:
            fetched = Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, file]))
            if (fetched / file).is_file():
                return fetched
        safe = [*_HUB_FILES, *also, "model*.safetensors", "model.safetensors.index.json"]
        fetched = Path(snapshot_download(name, allow_patterns=safe))
        if not any(fetched.glob("model*.safetensors")):
            fetched = Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, *also, "pytorch_model*.bin*"]))
    except Exception as error:  # the hub client raises many kinds, some of them not exported
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name}: no such folder, and the hub did not give it: {reason}") from error
    return fetched


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      InputError: no such file, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_student(folder: Path) -> StudentConfig:
    """Reads the settings of a vision tower from config.json and preprocessor_config.json.

    Args:
      folder: with config.json of `CLIPModel`, `CLIPVisionModel` or an exported student with LoRA experts;
        preprocessor_config.json may be missing, then CLIP's view is assumed.

    Returns:
      Settings with ``initialize`` empty; ``adapter.kind`` is ``none`` but for an exported student with LoRA experts.

    Raises:
      InputError: another model type, activation or field that the student cannot have.
    """
    path = folder / "config.json"
    return student_of(read_json(path), path, read_view(folder / "preprocessor_config.json"))


def student_of(config: Mapping[str, Any], path: Path, view: ViewConfig) -> StudentConfig:
    """Reads the settings of a vision tower from its configuration.

    Args:
      config: config.json, or the part of it that a larger model has for its tower.
      path: what it came from, for messages.
      view: of the pictures.

    Returns, raises: as `read_student`.
    """
    kind = config.get("model_type")
    if kind == "clip":
        nested = {**(config.get("vision_config") or {}), **(config.get("vision_config_dict") or {})}
        vision = {**_VISION_DEFAULTS, **nested}
    elif kind in ("clip_vision_model", *MODEL_TYPES.values()):
        vision = {**_VISION_DEFAULTS, **config}
    else:
        known = ", ".join(("clip", "clip_vision_model", *MODEL_TYPES.values()))
        raise InputError(f"{path}: model_type is {kind!r}, expected one of {known}")
    if vision["num_channels"] != 3:
        raise InputError(f"{path}: num_channels is {vision['num_channels']!r}, expected 3")
    if vision["hidden_act"] not in ("quick_gelu", "gelu"):
        raise InputError(f"{path}: hidden_act is {vision['hidden_act']!r}, expected quick_gelu or gelu")
    adapter: dict[str, Any] = {**dataclasses.asdict(AdapterConfig()), "kind": "none"}
    if kind in MODEL_TYPES.values():
        if not isinstance(config.get("adapter"), dict):
            raise InputError(f"{path}: field adapter is missing, expected the settings of the LoRA experts")
        # Fields that an older export did not know keep their defaults.
        adapter = {**dataclasses.asdict(AdapterConfig()), **config["adapter"]}
        if MODEL_TYPES.get(adapter["kind"]) != kind:
            raise InputError(f"{path}: model_type is {kind!r}, but adapter.kind is {adapter['kind']!r}")
    values = {
        **door.thaw(StudentConfig()).to_dict(),
        "image_size": _side(path, "image_size", vision["image_size"]),
        "patch_size": _side(path, "patch_size", vision["patch_size"]),
        "width": vision["hidden_size"],
        "layers": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "mlp_width": vision["intermediate_size"],
        "activation": vision["hidden_act"],
        "norm_epsilon": vision["layer_norm_eps"],
        "feature": read_feature(path, config.get("vision_feature_layer", -2)),
        "view": dataclasses.asdict(view),
        "adapter": adapter,
    }
    student = door.freeze(values, StudentConfig, str(path))
    sizes = ("image_size", "patch_size", "width", "layers", "heads", "mlp_width")
    if any(getattr(student, name) < 1 for name in sizes):
        raise InputError(f"{path}: sizes must be positive, found {[getattr(student, n) for n in sizes]}")
    if student.width % student.heads or student.patch_size > student.image_size:
        raise InputError(
            f"{path}: width {student.width} with {student.heads} heads, or image {student.image_size} with patch "
            f"{student.patch_size}, does not divide into whole heads and patches"
        )
    return student


def _side(path: Path, name: str, value: Any) -> Any:
    if isinstance(value, list) and value:
        if any(side != value[0] for side in value):
            raise InputError(f"{path}: {name} is {value}, expected a square")
        return value[0]
    return value


def read_view(path: Path) -> ViewConfig:
    """Reads how pictures are cut from preprocessor_config.json; without one CLIP's view is assumed."""
    if not path.is_file():
        return ViewConfig()
    try:
        view = View.from_preprocessor(read_json(path), str(path))
    except (TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: expected the settings of an image processor: {error}") from error
    return ViewConfig(fit=view.fit, interpolation=view.interpolation, mean=view.mean, std=view.std)


def read_feature(path: Path, layer: Any) -> str:
    """Returns our name of transformers' hidden state `layer`, which counts the embedding as 0."""
    if not isinstance(layer, int) or isinstance(layer, bool) or layer == 0:
        raise InputError(f"{path}: vision_feature_layer is {layer!r}, expected a number other than 0")
    return f"layers/{layer - 1 if layer > 0 else layer}"


def load_clip(folder_or_hub_id: str | Path, *, image_size: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads the vision tower of any CLIP checkpoint that transformers would load.

    Args:
      folder_or_hub_id: folder with config.json and weights (safetensors, shards, or a pickled .bin,
        read without running code), or a hub id.
      image_size: wanted side, pixels; position embeddings are resized when it differs.

    Returns:
      Fields of `StudentConfig` by name (``initialize`` set to the given name, ``adapter.kind`` none), so
      that ``StudentConfig(**fields)`` is the settings, and the parameter tree, float32.

    Raises:
      InputError: no such folder, not a CLIP, or a weight missing, unknown or of another shape.
    """
    folder = locate(folder_or_hub_id)
    student = read_student(folder)
    if student.adapter.kind != "none":
        raise InputError(
            f"{folder}: has LoRA experts ({MODEL_TYPES[student.adapter.kind]}), expected a plain CLIP; a run begins with "
            "them by config.train.start_from, and import_student reads them"
        )
    params = _tree(folder, student, _clip_arrays(folder))
    student = dataclasses.replace(student, initialize=str(folder_or_hub_id))
    return with_image_size(vars(student).copy(), params, image_size)


def import_student(folder_or_hub_id: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Brings an exported student back, plain or with LoRA experts, bit for bit.

    Args:
      folder_or_hub_id: what `tove_jax.hf.export.export_student` wrote, or any CLIP.

    Returns:
      Fields of `StudentConfig` by name, and the parameter tree, float32.

    Raises:
      InputError: a weight missing, unknown or of another shape, or a config that does not fit.
    """
    folder = locate(folder_or_hub_id)
    student = read_student(folder)
    return vars(student).copy(), _tree(folder, student, _clip_arrays(folder))


def import_mole_encoder(
    file: str | Path, base: str | Path, *, adapter: AdapterConfig | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads MoVE-KD's released adapter file (``mole_encoder.bin``) on top of a CLIP folder.

    The number of experts, the rank and the site are read from the file; routing, alpha and dropout
    are not stored in it.

    Args:
      file: state dict under the released names; tower weights it holds replace those of `base`, and encoder
        adapters are left to `import_encoder_adapters`.
      base: CLIP folder or hub id.
      adapter: routing, alpha, dropout; the released settings when None.

    Returns:
      Fields of `StudentConfig` by name, and the parameter tree, float32.

    Raises:
      InputError: as `import_student`.
    """
    folder = locate(base)
    student = read_student(folder)
    arrays = {name: array for name, array in read_arrays(file).items() if not encoder_adapters.is_name(name)}
    found = clip.canonical(arrays, str(file))
    fields = clip.adapter_fields(found, str(file))
    if fields["kind"] == "none":
        raise InputError(f"{file}: expected LoRA experts (encoder.layers.0.mlp.moe_down.0.lora_A.weight), found none")
    student = dataclasses.replace(student, adapter=dataclasses.replace(adapter or AdapterConfig(), **fields))
    return vars(student).copy(), _tree(Path(file), student, {**_clip_arrays(folder), **found})


def import_encoder_adapters(path: str | Path) -> dict[str, Any]:
    """Reads encoder adapters under the names of MoVE-KD's released ``encoder_adapter.bin``.

    Args:
      path: a file (safetensors, or a pickled .bin, read without running code), of which all other names are
        left out; or an export's folder, which may hold such a file.

    Returns:
      ``{expert: {"channel": {"kernel", "bias"}, "token": {...}}}``, float32: MoVE-KD's method parameters. Empty
      where there are none.

    Raises:
      InputError: an unreadable file, or adapters that are not whole.
    """
    path = Path(path)
    if path.is_dir():
        path = path / f"{encoder_adapters.FILE}.safetensors"
        if not path.is_file():
            return {}
    arrays = {name: array for name, array in read_arrays(path).items() if encoder_adapters.is_name(name)}
    return encoder_adapters.to_tree(arrays, str(path))


def _clip_arrays(folder: Path) -> dict[str, np.ndarray]:
    return clip.canonical(read_arrays(folder), str(folder))


def _tree(source: Path, student: StudentConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree = rules.to_tree(arrays, clip.RULES, clip.shapes(student), ignore=clip.IGNORE, source=str(source))
    leaves = rules.flatten(tree)
    for path, leaf in leaves.items():
        if leaf.dtype.kind not in "fV":  # ml_dtypes' bfloat16 and float8 are of kind V
            raise InputError(f"{source}: {path} has dtype {leaf.dtype}, expected floating point")
    return rules.unflatten({path: leaf.astype(np.float32, copy=False) for path, leaf in leaves.items()})


def with_image_size(
    fields: dict[str, Any], params: dict[str, Any], image_size: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns fields and parameters for another image size, position embeddings resized.

    Args:
      fields: of `StudentConfig`.
      params: the parameter tree.
      image_size: wanted side, pixels; None or the same changes nothing.
    """
    if image_size is None or image_size == fields["image_size"]:
        return fields, params
    grid = image_size // fields["patch_size"]
    if grid < 1:
        raise InputError(f"image_size: {image_size} is smaller than a patch of {fields['patch_size']} pixels")
    resized = resize_position(params["position_embed"], grid)
    return {**fields, "image_size": image_size}, {**params, "position_embed": resized}
