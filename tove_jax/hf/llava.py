"""Reads LLaVA-1.5 and LLaVA-NeXT from folders, in transformers' layout and the original one, array by array."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tove_jax.config.schema import AdapterConfig, ViewConfig
from tove_jax.data.anyres import Anyres
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.files.slices import Held, Readable, index_arrays
from tove_jax.files.weights import find_weights, read_arrays
from tove_jax.hf import clip, encoder_adapters, llama, llava_names, llava_processor
from tove_jax.hf.llava_config import Described, Extras, layout_of, plain_view, read_described
from tove_jax.hf.load import locate, read_json
from tove_jax.hf.place import place_arrays
from tove_jax.models import projector, vit
from tove_jax.models.llava import Llava, abstract_params

HUB_FILES = (*llava_processor.FILES, "generation_config.json", "mm_projector.bin")
"""What is fetched from the hub beside config.json and weights."""
_NO_TOWER = "the vision tower is not among the weights"


def load(
    folder_or_hub_id: str | Path,
    *,
    mesh: Mesh | None = None,
    store: Any = None,
    language: str | Path | None = None,
    vision: str | Path | None = None,
    adapter: AdapterConfig | None = None,
    **options: Any,
) -> tuple[Llava, dict[str, Any], Extras]:
    """Reads a whole model straight onto the devices, as `tove_jax.hf.llama.load` does.

    In transformers' layout of every release; or in the original one, whose weights may lack the vision tower (read
    from the folder or hub id that config.json names) and the language model (a first stage's ``mm_projector.bin``).

    Args:
      folder_or_hub_id: with config.json and weights, whole or in shards; pickled ones are read in parts too, and no
        code of theirs is run.
      mesh: where the parameters go, split by their logical axes; None: the first device.
      store: dtype of the parameters; None: that of the file.
      language: folder or hub id of the language model, where the weights have none.
      vision: of the vision tower, where the weights have none; None: as config.json names it.
      adapter: routing, alpha and dropout of LoRA experts that the original layout's weights hold, as MoVE-KD's
        released models do; None: the released settings.
      **options: ``dtype``, ``attention`` and ``remat`` of the whole model; ``lora_*`` of the decoder.

    Returns:
      The model, its parameters, and what else the folder holds.

    Raises:
      InputError: not such a folder; arrays that are missing, unknown or of another shape, all named; missing shards;
        a vocabulary or a view that does not fit.
    """
    folder = locate(folder_or_hub_id, also=HUB_FILES)
    path = folder / "config.json"
    config = read_json(path)
    original = layout_of(config, path) == "original"
    parts, names = _find_arrays(folder)
    tower_folder, tower_config = None, None
    if original:
        tower_folder = _tower_folder(config, path, vision)
        tower_config = read_json(tower_folder / "config.json")
        if parts["tower"]:
            adapter = _found_adapter(parts["tower"], names["tower"], adapter, str(folder))
        else:
            adapter = None
    where = folder if tower_folder is None else tower_folder
    settings, settings_path = _processor_settings(where)
    described = read_described(
        config, path, tower=tower_config, view=_view_config(settings, settings_path), adapter=adapter, **options
    )
    view = _view(settings, settings_path, described)
    described = dataclasses.replace(described, student=dataclasses.replace(described.student, view=plain_view(view)))
    model, tree = described.model, abstract_params(described.model)
    if not parts["tower"]:
        if tower_folder is None and vision is None:
            raise InputError(f"{folder}: {_NO_TOWER}")
        source = locate(vision) if tower_folder is None and vision is not None else where
        parts["tower"], names["tower"] = dict(clip.canonical(index_arrays(source), str(source))), ""
    if not parts["decoder"]:
        if language is None:
            raise InputError(f"{folder}: the language model is not among the weights; say where it is (language=)")
        found, spelling = llava_names.sort_arrays(index_arrays(locate(language)), str(language))
        parts |= {part: found[part] for part in ("decoder", "head")}
        names |= {part: spelling.get(part, names[part]) for part in ("decoder", "head")}
    _check_vocabulary(described, parts["decoder"], names["decoder"], path)
    if described.identity:
        _drop_identity(parts["projector"], names["projector"], folder)

    def place(tree: Any, part: dict[str, Readable], rules: Any, axes: Any, ignore: tuple[str, ...] = ()) -> Any:
        return place_arrays(tree, part, rules, axes, mesh=mesh, store=store, ignore=ignore, source=str(folder))

    newline = {name: tree["language"][name] for name in ("projector", "newline") if name in tree["language"]}
    rules = llava_names.language_rules(names, model.projector.kind)
    beside = place(newline, {**parts["projector"], **parts["newline"]}, rules, _BESIDE_AXES)
    rules = llava_names.tower_rules(names["tower"])
    tower = place(tree["student"], parts["tower"], rules, vit.logical_axes(), clip.IGNORE)
    decoder = llama.load_params(
        model.decoder,
        {**parts["decoder"], **parts["head"]},
        rules=llava_names.decoder_rules(names),
        mesh=mesh,
        store=store,
        source=str(folder),
    )
    return (
        model,
        {"student": tower, "language": {**beside, "model": decoder}},
        Extras(folder, config, described, names, view),
    )


_BESIDE_AXES = ((r"newline", ("embed",)), *projector.LOGICAL_AXES)


def _find_arrays(folder: Path) -> tuple[dict[str, dict[str, Readable]], dict[str, str]]:
    """Returns the arrays of a folder by part; ``mm_projector.bin`` where the weights have no projector."""
    arrays: dict[str, Readable] = {}
    apart = [folder / f"mm_projector{suffix}" for suffix in (".safetensors", ".bin")]
    apart = [path for path in apart if path.is_file()]
    try:
        find_weights(folder)
    except InputError:
        if not apart:
            raise
    else:
        arrays.update(index_arrays(folder))
    arrays = {name: array for name, array in arrays.items() if not encoder_adapters.is_name(name)}
    if apart and not any("mm_projector." in name for name in arrays):
        arrays |= {name: Held(array) for name, array in read_arrays(apart[0]).items()}
    parts, names = llava_names.sort_arrays(arrays, str(folder))
    return parts, {**llava_names.TRANSFORMERS, **names}


def _tower_folder(config: Mapping[str, Any], path: Path, vision: str | Path | None) -> Path:
    name = vision or config.get("mm_vision_tower") or config.get("vision_tower")
    if not isinstance(name, str | Path):
        raise InputError(f"{path}: mm_vision_tower: expected a folder or hub id, found {name!r}")
    beside = path.parent / name
    try:
        return beside if beside.is_dir() else locate(name)
    except InputError as error:
        raise InputError(f"{path}: mm_vision_tower: {error} (say where it is: vision=)") from None


def _found_adapter(
    arrays: Mapping[str, Any], prefix: str, adapter: AdapterConfig | None, source: str
) -> AdapterConfig | None:
    fields = clip.adapter_fields({name.removeprefix(prefix): array for name, array in arrays.items()}, source)
    if fields["kind"] == "none":
        return None
    return dataclasses.replace(adapter or AdapterConfig(), **fields)


def _processor_settings(folder: Path) -> tuple[dict[str, Any] | None, Path]:
    """Returns the image processor's settings, of whichever file has them."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        return read_json(path), path
    nested = folder / "processor_config.json"
    if nested.is_file() and isinstance(found := read_json(nested).get("image_processor"), dict):
        return found, nested
    return None, path


def _read_view(settings: dict[str, Any], path: Path) -> View:
    if "image_grid_pinpoints" in settings:
        settings = {name: value for name, value in settings.items() if name != "do_pad"}
    try:
        return View.from_preprocessor(settings, str(path))
    except (TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: expected the settings of an image processor: {error}") from error


def _view_config(settings: dict[str, Any] | None, path: Path) -> ViewConfig:
    return ViewConfig() if settings is None else plain_view(_read_view(settings, path))


def _view(settings: dict[str, Any] | None, path: Path, described: Described) -> View | Anyres:
    size = described.student.image_size
    view = View(size) if settings is None else _read_view(settings, path)
    if view.size != size:
        raise InputError(f"{path}: gives pictures of {view.size} pixels, the vision tower takes {size}")
    if described.resolutions:
        tile = dataclasses.replace(view, fit="squash", resize=None)
        return Anyres(tile, described.student.patch_size, described.resolutions)
    return dataclasses.replace(view, fit="pad", resize=None) if described.squares == "pad" else view


def _check_vocabulary(described: Described, arrays: Mapping[str, Readable], prefix: str, path: Path) -> None:
    stored, wanted = arrays.get(f"{prefix}embed_tokens.weight"), described.model.decoder.vocabulary
    if stored is not None and stored.shape[:1] != (wanted,):
        raise InputError(
            f"{path}: the vocabulary does not match the weights: vocab_size is {wanted}, {prefix}embed_tokens.weight has "
            f"{stored.shape[0]} rows"
        )
    if described.image_token is not None and described.image_token >= wanted:
        raise InputError(
            f"{path}: image_token_index {described.image_token} is beyond the vocabulary of {wanted} tokens"
        )


def _drop_identity(arrays: dict[str, Readable], prefix: str, folder: Path) -> None:
    """Takes out the second linear of a projector without an activation, which must change nothing."""
    weight, bias = (arrays.pop(f"{prefix}linear_2.{name}", None) for name in ("weight", "bias"))
    if (
        weight is None
        or not np.array_equal(weight.read(), np.eye(weight.shape[0]))
        or (bias is not None and bias.read().any())
    ):
        raise InputError(f"{folder}: {prefix}linear_2: expected the identity, since projector_hidden_act is linear")
