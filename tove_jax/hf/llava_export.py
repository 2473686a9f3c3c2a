"""Writes LLaVA-1.5 and LLaVA-NeXT as folders, in transformers' layout and the original one, array by array."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tove_jax.config.schema import StudentConfig, ViewConfig
from tove_jax.data.anyres import Anyres
from tove_jax.data.conversation import get_template
from tove_jax.data.tokenizer import Tokenizer, load_tokenizer
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.files.atomic import atomic_folder, atomic_write_bytes, atomic_write_json
from tove_jax.files.slices import Pending, write_array_files
from tove_jax.hf import clip, llama, llava_names, llava_processor
from tove_jax.hf.export import remote_code
from tove_jax.hf.llava_config import Extras, plain_view, student_settings, to_config
from tove_jax.hf.place import pending_arrays
from tove_jax.hf.rules import flatten, match_shapes
from tove_jax.models.llava import Llava, abstract_params

_TEXT_FIELDS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def export(
    model: Llava,
    params: Mapping[str, Any],
    folder: Path | str,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    view: View | Anyres | None = None,
    student: StudentConfig | None = None,
    template: str = "v1",
    like: Extras | None = None,
    layout: Literal["transformers", "original"] = "transformers",
    files: Mapping[str, bytes] | None = None,
    store: Any = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder whole or not at all, array by array; what was read goes out to the bit.

    In transformers' layout it is a `LlavaForConditionalGeneration` (or `LlavaNextForConditionalGeneration`) with its
    processor. With LoRA experts in the tower it carries its modelling files, for
    ``AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)``. A tokenizer without ``<image>``
    gets it; where that needs more rows of the token embedding and the head, their number is rounded up to a multiple
    of 64 and the new ones are the mean of the others. In the original layout nothing is added, and the weights hold
    the vision tower.

    Args:
      model: the model.
      params: its parameters.
      folder: target; an older one is replaced.
      tokenizer: folder, hub id, or tokenizer; None: that of `like`.
      view: how pictures are cut; None: as `like`, else as `student` has it.
      student: settings of the tower; None: as `like`, else read off a plain tower.
      template: of conversations, see `tove_jax.data.conversation.TEMPLATES`.
      like: what the model was read from; in the same layout, its config.json and processor are kept as they are.
      layout: ``original``: LLaVA's own names and config.json.
      files: further files by name, such as README.md.
      store: dtype of the arrays; None: as in the tree.
      shard_bytes: see `tove_jax.files.slices.write_array_files`.

    Raises:
      InputError: parameters, a config or a tokenizer that do not fit the model; no tokenizer; a folder that cannot be
        written.
    """
    leaves = flatten(params)
    expected = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    match_shapes(leaves, expected, "parameters do not fit the model")
    view = view or (like.view if like else None)
    if student is None:
        student = like.student if like else student_settings(model, plain_view(view) if view else ViewConfig())
    if view is None:
        view = View.of_student(student)
    if isinstance(view, Anyres) != model.anyres:
        raise InputError("view: expected tiles (Anyres) for LLaVA-NeXT, and none else")
    same = like is not None and like.described.layout == layout
    copied = like.folder if like is not None and same and tokenizer is None and view == like.view else None
    if layout == "original":
        names = llava_names.ORIGINAL
        rows, image, vocabulary = model.decoder.vocabulary, None, None
    else:
        names = llava_names.TRANSFORMERS if student.adapter.kind == "none" else llava_names.REMOTE
        if like is not None and same and student.adapter.kind == "none":
            names = like.names
        rows, image, vocabulary = model.decoder.vocabulary, like.image_token if like else None, None
        if copied is None or image is None:
            opened = _open(tokenizer, like)
            vocabulary = llava_processor.add_image_token(opened, get_template(template), rows, image if same else None)
            rows, image = vocabulary.rows, vocabulary.image_token
    arrays = _pending(model, params, names, grown=rows)
    config = _config(model, student, view, like if same else None, like, rows, image, layout)
    if store is not None:
        arrays = {name: _cast(array, np.dtype(store)) for name, array in arrays.items()}
    config["dtype"] = np.dtype(store or leaves["language/model/token_embed"].dtype).name
    with atomic_folder(folder) as temporary:
        write_array_files(temporary, arrays, shard_bytes=shard_bytes)
        atomic_write_json(temporary / "config.json", config)
        if copied is not None:
            llava_processor.copy_processor(copied, temporary)
            if (copied / "generation_config.json").is_file():
                atomic_write_bytes(
                    temporary / "generation_config.json", (copied / "generation_config.json").read_bytes()
                )
        elif vocabulary is not None:
            llava_processor.write_processor(
                temporary,
                vocabulary,
                get_template(template),
                view,
                patch_size=model.tower.patch_size,
                keep_class=model.keep_class,
            )
            inner, ends = vocabulary.inner, list(vocabulary.ends)
            generation = {
                "bos_token_id": inner.bos_token_id,
                "eos_token_id": ends if len(ends) > 1 else ends[0],
                "pad_token_id": inner.pad_token_id,
            }
            atomic_write_json(temporary / "generation_config.json", generation)
        elif tokenizer is not None or (like is not None and any(like.folder.glob("tokenizer*"))):
            _open(tokenizer, like).inner.save_pretrained(str(temporary))
        kind = student.adapter.kind
        if layout == "transformers" and kind != "none":
            for part in (f"{kind}_clip", f"{kind}_llava"):
                for name in (f"configuration_{part}.py", f"modeling_{part}.py"):
                    atomic_write_bytes(temporary / name, remote_code(name))
        for name, content in (files or {}).items():
            atomic_write_bytes(temporary / name, content)


def _open(tokenizer: Tokenizer | str | Path | None, like: Extras | None) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer is None and like is None:
        raise InputError("LLaVA: transformers' layout needs a tokenizer (tokenizer=)")
    return load_tokenizer(tokenizer) if tokenizer is not None else like.tokenizer()  # type: ignore[union-attr]


def _pending(model: Llava, params: Mapping[str, Any], names: Mapping[str, str], grown: int) -> dict[str, Pending]:
    """Returns every published array, the token embedding and the head with `grown` rows."""
    language = dict(params["language"])
    decoder = pending_arrays(language.pop("model"), llava_names.decoder_rules(names))
    for name in (f"{names['decoder']}embed_tokens.weight", names["head"]):
        if name in decoder and grown > decoder[name].shape[0]:
            decoder[name] = _grow(decoder[name], grown)
    beside = pending_arrays(language, llava_names.language_rules(names, model.projector.kind))
    prefix = names["projector"]
    if model.projector.kind == "linear" and not prefix.endswith("mm_projector."):
        dtype, width = beside[f"{prefix}linear_1.weight"].dtype, model.decoder.width
        beside[f"{prefix}linear_2.weight"] = Pending(dtype, (width, width), lambda: np.eye(width, dtype=dtype))
        if model.projector.bias:
            beside[f"{prefix}linear_2.bias"] = Pending(dtype, (width,), lambda: np.zeros(width, dtype))
    tower = pending_arrays(params["student"], llava_names.tower_rules(names["tower"]))
    if names["projector"].endswith("mm_projector."):
        # As the original code calls the MLP beside its experts.
        tower = clip.released(tower) if any(".mlp.router." in name for name in tower) else tower
    return {**tower, **beside, **decoder}


def _grow(array: Pending, rows: int) -> Pending:
    def get() -> np.ndarray:
        found = array.get()
        mean = found.astype(np.float32).mean(axis=0).astype(found.dtype)
        return np.concatenate([found, np.broadcast_to(mean, (rows - len(found), *mean.shape))])

    return Pending(array.dtype, (rows, *array.shape[1:]), get)


def _cast(array: Pending, dtype: np.dtype) -> Pending:
    return Pending(dtype, array.shape, lambda: array.get().astype(dtype))


def _config(
    model: Llava,
    student: StudentConfig,
    view: View | Anyres,
    same: Extras | None,
    like: Extras | None,
    rows: int,
    image: int | None,
    layout: str,
) -> dict[str, Any]:
    """Returns config.json: as read where it is of the layout and fits, else made."""
    if same is not None and rows == model.decoder.vocabulary:
        if same.described.model != model or same.student.adapter != student.adapter:
            raise InputError(f"{same.folder}: its config.json describes another model than the one to be exported")
        config = dict(same.config)
        config.pop("torch_dtype", None)
        return config
    text: dict[str, Any] = {}
    if like is not None:
        given = like.config.get("text_config") or like.config
        text = {name: given[name] for name in _TEXT_FIELDS if name in given}
    if layout == "original":
        return _original_config(model, student, view, text)
    resolutions = view.resolutions if isinstance(view, Anyres) else ()
    if image is None:
        raise ValueError("transformers' layout needs an image token")
    return to_config(model, student, vocabulary=rows, image_token=image, resolutions=resolutions, text=text)


def _original_config(
    model: Llava, student: StudentConfig, view: View | Anyres, text: Mapping[str, Any]
) -> dict[str, Any]:
    config = {**text, **llama.to_config(model.decoder)}
    kind = config["model_type"]
    layers = model.features
    if len(layers) > 1 or layers[0] == "embeddings" or not model.projector.bias:
        raise InputError("LLaVA: the original layout reads one layer, and its projector has biases")
    layer = int(layers[0].removeprefix("layers/"))
    return config | {
        "architectures": [
            {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}.get(kind, "LlavaQwenForCausalLM")
        ],
        "model_type": {"llama": "llava_llama"}.get(kind, f"llava_{kind.removesuffix('2')}"),
        "mm_vision_tower": student.initialize or "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": model.tower.width,
        "mm_projector_type": model.projector.kind,
        "mm_vision_select_layer": layer if layer < 0 else layer + 1,
        "mm_vision_select_feature": "cls_patch" if model.keep_class else "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres" if model.anyres else "pad" if student.view.fit == "pad" else "square",
        "mm_patch_merge_type": "spatial_unpad" if model.anyres else "flat",
        **(
            {"image_grid_pinpoints": [list(pair[::-1]) for pair in view.resolutions]}
            if isinstance(view, Anyres)
            else {}
        ),
    }
