"""What the config.json of a LLaVA describes: transformers' LLaVA-1.5 and LLaVA-NeXT, and the original layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from tove_jax.config.schema import AdapterConfig, StudentConfig, ViewConfig
from tove_jax.data.anyres import RESOLUTIONS, Anyres
from tove_jax.data.tokenizer import Tokenizer, load_tokenizer
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.hf import llama
from tove_jax.hf.export import hf_config
from tove_jax.hf.load import MODEL_TYPES, student_of
from tove_jax.models import vit
from tove_jax.models.llava import Llava
from tove_jax.models.projector import Projector

Layout = Literal["transformers", "original"]
REMOTE_TYPES = {kind: f"{kind}_llava" for kind in MODEL_TYPES}  # by adapter.kind
_ORIGINAL = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_KINDS = ("llava", "llava_next", *REMOTE_TYPES.values())
_STRATEGIES = {"default": False, "full": True}
_VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""CLIP ViT-L/14 at 336 pixels, which a config.json may leave out."""


@dataclasses.dataclass(frozen=True)
class Described:
    """What a config.json says.

    Attributes:
      model: the model.
      student: settings of its tower; ``feature`` is the last of those that the model reads.
      layout: whose config.json it is.
      resolutions: of LLaVA-NeXT's grids, (height, width), pixels; empty: none.
      image_token: id of ``<image>``; None where the layout has none.
      identity: the projector is one linear, which transformers holds as two with an identity (ours).
      squares: how the original layout brings pictures to a square: ``pad`` or as the tower's processor does;
        None where the processor's own settings tell.
    """

    model: Llava
    student: StudentConfig
    layout: Layout
    resolutions: tuple[tuple[int, int], ...] = ()
    image_token: int | None = None
    identity: bool = False
    squares: str | None = None


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a folder holds beside the model; `export` writes it out again.

    Attributes:
      folder: where it was read.
      config: config.json as read.
      described: what that says.
      names: how the names of each part of the weights began.
      view: how pictures are cut.
    """

    folder: Path
    config: dict[str, Any]
    described: Described
    names: dict[str, str]
    view: View | Anyres

    @property
    def student(self) -> StudentConfig:
        """Settings of the tower."""
        return self.described.student

    @property
    def image_token(self) -> int | None:
        """Id of ``<image>``, where the model has one."""
        return self.described.image_token

    def tokenizer(self) -> Tokenizer:
        """Opens the folder's tokenizer; raises InputError where there is none."""
        return load_tokenizer(self.folder)

    def ends(self) -> tuple[int, ...]:
        """Returns the ids at which an answer ends, as the folder tells; empty where it does not."""
        content = self.config.get("text_config")
        found = llama.end_tokens(self.folder)
        if found or not isinstance(content, dict) or content.get("eos_token_id") is None:
            return found
        end = content["eos_token_id"]
        return tuple(end) if isinstance(end, list) else (int(end),)


def plain_view(view: View | Anyres) -> ViewConfig:
    """Returns a view as the student's settings have it."""
    view = view.view if isinstance(view, Anyres) else view
    return ViewConfig(fit=view.fit, interpolation=view.interpolation, mean=view.mean, std=view.std)


def find_layout(config: Mapping[str, Any]) -> Layout | None:
    """Returns whose config.json it is; None: no LLaVA's."""
    kind = config.get("model_type")
    if kind in _ORIGINAL and ("mm_vision_tower" in config or "mm_hidden_size" in config):
        return "original"
    return "transformers" if kind in _KINDS else None


def layout_of(config: Mapping[str, Any], path: Path) -> Layout:
    """Returns whose config.json it is.

    Raises:
      InputError: no LLaVA's.
    """
    layout = find_layout(config)
    if layout is None:
        raise InputError(
            f"{path}: model_type: expected {', '.join(_KINDS)}, or the original {', '.join(_ORIGINAL)} with "
            f"mm_vision_tower, found {config.get('model_type')!r}"
        )
    return layout


def feature_name(layer: Any, path: Path) -> str:
    """Returns our name of transformers' hidden state `layer`, which counts the embedding as 0.

    Raises:
      InputError: no number.
    """
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise InputError(f"{path}: vision_feature_layer: expected a number or a list of them, found {layer!r}")
    if layer == 0:
        return "embeddings"
    return f"layers/{layer - 1 if layer > 0 else layer}"


def _features(layers: Any, path: Path) -> str | tuple[str, ...]:
    if isinstance(layers, list) and layers:
        return tuple(feature_name(layer, path) for layer in layers)
    return feature_name(layers, path)


def read_described(
    config: Mapping[str, Any],
    path: Path,
    *,
    tower: Mapping[str, Any] | None = None,
    view: ViewConfig | None = None,
    adapter: AdapterConfig | None = None,
    **options: Any,
) -> Described:
    """Builds the model that a config.json describes; nothing else is read.

    Args:
      config: its content.
      path: where it came from, for messages.
      tower: config.json of the vision tower, for the original layout, which only names it.
      view: of the tower's pictures; None: CLIP's.
      adapter: LoRA experts that the original layout's arrays hold, and its config.json does not know.
      **options: ``dtype``, ``attention`` and ``remat`` of the whole model; ``lora_*`` of the decoder.

    Raises:
      InputError: another kind of model, or an option of it that is not known here.
    """
    layout = layout_of(config, path)
    chosen = {name: options[name] for name in ("attention", "remat") if name in options}
    dtype = options.get("dtype", jnp.float32)
    if layout == "original":
        vision = {**_VISION, **(tower or {})}
        if vision["model_type"] == "clip":
            vision = {**vision, **(vision.get("vision_config") or {}), "model_type": "clip_vision_model"}
        text = {**config, "model_type": _ORIGINAL[config["model_type"]]}
        fields = _read_original(config, path)
    else:
        vision = {**_VISION, **(config.get("vision_config") or {})}
        text = {"model_type": "llama", **(config.get("text_config") or {})}
        text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
        fields = _read_transformers(config, path)
    feature = fields["feature"]
    student = student_of({**vision, "vision_feature_layer": -2}, path, view or ViewConfig())
    last = feature if isinstance(feature, str) else feature[-1]
    student = dataclasses.replace(student, feature=last, adapter=adapter or student.adapter, **chosen)
    if fields["resolutions"]:
        for pair in fields["resolutions"]:
            if any(side % student.image_size for side in pair):
                raise InputError(
                    f"{path}: image_grid_pinpoints: expected multiples of the tower's {student.image_size} pixels, "
                    f"found {pair}"
                )
        if fields["keep_class"]:
            raise InputError(f"{path}: tiles need patches alone, found the select strategy that keeps CLS")
    decoder = llama.from_config(text, str(path), **options)
    model = Llava(
        tower=vit.from_config(student, dtype),
        projector=Projector(decoder.width, fields["projector"], dtype, fields["bias"]),
        decoder=decoder,
        feature=feature,
        keep_class=fields["keep_class"],
        anyres=bool(fields["resolutions"]),
    )
    return Described(
        model,
        student,
        layout,
        fields["resolutions"],
        fields["image_token"],
        layout == "transformers" and fields["projector"] == "linear",
        fields.get("squares"),
    )


def _read_transformers(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    act = config.get("projector_hidden_act", "gelu")
    if act not in ("gelu", "linear"):
        raise InputError(f"{path}: projector_hidden_act: expected gelu (or linear), found {act!r}")
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in _STRATEGIES:
        raise InputError(f"{path}: vision_feature_select_strategy: expected default or full, found {strategy!r}")
    token = config.get("image_token_index", config.get("image_token_id", 32000))
    if not isinstance(token, int) or token < 0:
        raise InputError(f"{path}: image_token_index: expected the id of a token, found {token!r}")
    tiles = config["model_type"] == "llava_next" or "image_grid_pinpoints" in config
    return {
        "feature": _features(config.get("vision_feature_layer", -2), path),
        "keep_class": _STRATEGIES[strategy],
        "projector": "mlp2x_gelu" if act == "gelu" else "linear",
        "bias": bool(config.get("multimodal_projector_bias", True)),
        "image_token": token,
        "resolutions": _resolutions(config.get("image_grid_pinpoints") or RESOLUTIONS, path) if tiles else (),
    }


def _read_original(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    kind = config.get("mm_projector_type") or "linear"
    if kind not in ("linear", "mlp2x_gelu"):
        raise InputError(f"{path}: mm_projector_type: expected linear or mlp2x_gelu, found {kind!r}")
    selected = config.get("mm_vision_select_feature", "patch")
    if selected not in ("patch", "cls_patch"):
        raise InputError(f"{path}: mm_vision_select_feature: expected patch or cls_patch, found {selected!r}")
    if config.get("mm_use_im_start_end"):
        raise InputError(f"{path}: mm_use_im_start_end: tokens around pictures (LLaVA before 1.5) are not supported")
    squares = config.get("image_aspect_ratio") or "square"
    if squares not in ("pad", "square", "anyres"):
        raise InputError(f"{path}: image_aspect_ratio: expected pad, square or anyres, found {squares!r}")
    merged = config.get("mm_patch_merge_type") or "flat"
    if merged != ("spatial_unpad" if squares == "anyres" else "flat"):
        raise InputError(
            f"{path}: mm_patch_merge_type: expected spatial_unpad with image_aspect_ratio anyres and flat else, found "
            f"{merged!r} with {squares!r}"
        )
    resolutions: tuple[tuple[int, int], ...] = ()
    if squares == "anyres":
        found = config.get("image_grid_pinpoints") or [pair[::-1] for pair in RESOLUTIONS]
        # The original code writes width before height.
        resolutions = tuple(pair[::-1] for pair in _resolutions(found, path))
    return {
        "feature": _features(config.get("mm_vision_select_layer", -2), path),
        "keep_class": selected == "cls_patch",
        "projector": kind,
        "bias": True,
        "image_token": None,
        "resolutions": resolutions,
        "squares": "pad" if squares == "pad" else "square",
    }


def _resolutions(given: Any, path: Path) -> tuple[tuple[int, int], ...]:
    sound = isinstance(given, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair)
        for pair in given
    )
    if not sound or not given:
        raise InputError(f"{path}: image_grid_pinpoints: expected pairs of pixels, found {given!r}")
    return tuple((pair[0], pair[1]) for pair in given)


def _layer_number(feature: str) -> int:
    """Returns transformers' number of a hidden state."""
    if feature == "embeddings":
        return 0
    layer = int(feature.removeprefix("layers/"))
    return layer if layer < 0 else layer + 1


def student_settings(model: Llava, view: ViewConfig) -> StudentConfig:
    """Returns the settings of a plain tower.

    Raises:
      InputError: it has LoRA experts, whose settings its module does not tell.
    """
    tower = model.tower
    if tower.adapter is not None:
        raise InputError("LLaVA: a tower with LoRA experts needs its settings to be exported (student=)")
    return StudentConfig(
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        width=tower.width,
        layers=tower.depth,
        heads=tower.heads,
        mlp_width=tower.mlp_width,
        activation=tower.activation,
        norm_epsilon=tower.norm_epsilon,
        feature=model.features[-1],
        view=view,
        adapter=AdapterConfig(kind="none"),
    )


def auto_map(kind: str) -> dict[str, str]:
    """Returns where config.json finds our remote code, by ``adapter.kind``."""
    name = f"{kind.capitalize()}Llava"
    return {
        "AutoConfig": f"configuration_{kind}_llava.{name}Config",
        "AutoModelForImageTextToText": f"modeling_{kind}_llava.{name}ForConditionalGeneration",
    }


def to_config(
    model: Llava,
    student: StudentConfig,
    *,
    vocabulary: int,
    image_token: int,
    resolutions: tuple[tuple[int, int], ...] = (),
    text: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns config.json in transformers' layout.

    Args:
      model: the model.
      student: settings of its tower.
      vocabulary: rows of the token embedding as written.
      image_token: id of ``<image>``.
      resolutions: of LLaVA-NeXT's grids.
      text: fields of the language model's own config.json that its module does not know, such as its longest text.

    Raises:
      InputError: a tower with LoRA experts and tiles, for which there is no remote code.
    """
    kind = student.adapter.kind
    vision = hf_config(student)
    for name in ("architectures", "dtype", "vision_feature_layer", "auto_map"):
        vision.pop(name, None)
    decoder = {**(text or {}), **llama.to_config(dataclasses.replace(model.decoder, vocabulary=vocabulary))}
    decoder.pop("architectures")
    layers = [_layer_number(name) for name in model.features]
    config: dict[str, Any] = {
        "architectures": ["LlavaNextForConditionalGeneration" if model.anyres else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if model.anyres else "llava",
        "image_token_index": image_token,
        "image_seq_length": model.tokens,
        "projector_hidden_act": "gelu" if model.projector.kind == "mlp2x_gelu" else "linear",
        "multimodal_projector_bias": model.projector.bias,
        "vision_feature_layer": layers[0] if isinstance(model.feature, str) else layers,
        "vision_feature_select_strategy": "full" if model.keep_class else "default",
        "tie_word_embeddings": model.decoder.tied,
        "vision_config": vision,
        "text_config": decoder,
    }
    if model.anyres:
        config["image_grid_pinpoints"] = [list(pair) for pair in resolutions]
    if kind != "none":
        if model.anyres:
            raise InputError("LLaVA-NeXT with LoRA experts in its tower: export it with the experts left out")
        name = f"{kind.capitalize()}Llava"
        config |= {
            "architectures": [f"{name}ForConditionalGeneration"],
            "model_type": REMOTE_TYPES[kind],
            "auto_map": auto_map(kind),
        }
    return config
