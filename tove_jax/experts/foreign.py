"""Experts that no table lists: a torch model, an ONNX file, a Python function. They run on the host.

What they share is here: the settings that tell what a picture must look like, what may come out, and the card.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.config.specs import ForeignSpec
from tove_jax.data.view import View
from tove_jax.errors import InputError, nearest
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures
from tove_jax.experts.manifest import Manifest

ATTRIBUTE = "tove_settings"
"""Attribute of a callable that holds its settings as a dict; `tove_jax.experts.function.expert` sets it."""
_TEXTS = ("title", "paper", "licence")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What must be known of a model that nobody published a card for.

    Attributes:
      view: what the model is shown.
      title, paper, licence: for tables and manifests.
      prefix: tokens before the patches (CLS, registers) in an output (B, N, D); None: none.
      outputs: ``patches`` and ``summary`` -> name of the output that holds it, where outputs have names.
      files: further files, relative to the working folder, that belong to the weights; hashed with them.
    """

    view: View
    title: str = ""
    paper: str = "not told"
    licence: str = "not told"
    prefix: int | None = None
    outputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: tuple[str, ...] = ()

    def sized(self, size: int | None) -> Settings:
        """Returns the same settings for pictures of `size` pixels a side; what is cut off stays in proportion."""
        if size is None or size == self.view.size:
            return self
        resize = self.view.resize and round(self.view.resize * size / self.view.size)
        return dataclasses.replace(self, view=dataclasses.replace(self.view, size=size, resize=resize))


def read_settings(values: Mapping[str, Any], where: str, *, size: int | None = None) -> Settings:
    """Reads settings from a dict or a JSON object.

    Args:
      values: any field of `View`, such as ``size``, ``mean`` and ``std``, and any of `Settings` but the view.
      where: names them in errors.
      size: of the view, where the values say none.

    Raises:
      InputError: no size, an unknown field (the nearest one is named), or a value of another type.
    """
    sights = {field.name for field in dataclasses.fields(View)} - {"flip"}
    others = {field.name for field in dataclasses.fields(Settings)} - {"view"}
    for name in values:
        if name not in sights | others:
            raise InputError(f"{where}: unknown field '{name}'{nearest(name, sights | others)}")
    view = {name: value for name, value in values.items() if name in sights}
    if "size" not in view:
        if size is None:
            raise InputError(f"{where}: expected the field size, the pixels a side that the model takes, found none")
        view["size"] = size
    if not isinstance(view["size"], int):
        raise InputError(f"{where}: size: expected a number of pixels, found {view['size']!r}")
    try:
        shown = View(**view)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error
    found = {name: value for name, value in values.items() if name in others}
    outputs, prefix, files = found.get("outputs", {}), found.get("prefix"), found.get("files", ())
    for name, valid, expected in (
        *((name, isinstance(found.get(name, ""), str), "a text") for name in _TEXTS),
        ("outputs", _is_outputs(outputs), "names for patches and perhaps summary"),
        ("prefix", prefix is None or isinstance(prefix, int) and prefix >= 0, "a number of tokens"),
        ("files", isinstance(files, (list, tuple)) and all(isinstance(file, str) for file in files), "file names"),
    ):
        if not valid:
            raise InputError(f"{where}: {name}: expected {expected}, found {found[name]!r}")
    return Settings(shown, **{**found, **({"files": tuple(files)} if files else {})})


def _is_outputs(outputs: Any) -> bool:
    return (
        isinstance(outputs, Mapping)
        and outputs.keys() <= {"patches", "summary"}
        and (not outputs or "patches" in outputs)
        and all(isinstance(name, str) for name in outputs.values())
    )


def import_callable(source: str, where: str) -> Callable[..., Any]:
    """Returns what ``package.module:callable`` names; the module is imported.

    Raises:
      InputError: not of this form, no such module or name, or nothing that can be called.
    """
    module, colon, name = source.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise InputError(f"expert {where}: expected package.module:callable, found {source!r}")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"expert {where}: cannot import {module!r}: {error}; is it installed, or its folder in PYTHONPATH?"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"expert {where}: module {module!r} has no '{part}'{nearest(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"expert {where}: expected a callable, found {type(found).__name__}")
    return found


def settings_of(function: Any, where: str) -> Settings:
    """Returns the settings that a callable carries.

    Raises:
      InputError: it carries none, or what it carries does not read.
    """
    values = getattr(function, ATTRIBUTE, None)
    if not isinstance(values, Mapping):
        raise InputError(
            f"expert {where}: nothing tells what pictures it takes; expected tove_jax.experts.function.expert(size=...) "
            f"over it, or a dict in its attribute {ATTRIBUTE}"
        )
    return read_settings(values, f"expert {where}")


def to_features(values: Any, settings: Settings, where: str, *, channels_first: bool) -> ExpertFeatures:
    """Brings what a model returned to features.

    Args:
      values: `ExpertFeatures`, a mapping with ``patches`` and perhaps ``summary``, or the patches alone. Patches
        are tokens (B, N, D), `prefix` of them in front, then a square grid row by row; or a map (B, D, H, W) when
        `channels_first`, (B, H, W, D) otherwise. A summary is (B, S).
      settings: of the model.
      where: names it in errors.
      channels_first: order of maps.

    Returns:
      NumPy features, float32, patches (B, H, W, D).

    Raises:
      InputError: something else.
    """
    if isinstance(values, ExpertFeatures):
        return ExpertFeatures(*(None if value is None else np.asarray(value, np.float32) for value in values))
    if isinstance(values, Mapping):
        if "patches" not in values or not values.keys() <= {"patches", "summary"}:
            raise InputError(f"{where}: expected outputs patches and perhaps summary, found {', '.join(values)}")
        patches, summary = values["patches"], values.get("summary")
    else:
        patches, summary = values, None
    patches = np.asarray(patches)
    if patches.ndim == 4:
        patches = patches.transpose(0, 2, 3, 1) if channels_first else patches
    elif patches.ndim == 3:
        prefix = settings.prefix or 0
        side = math.isqrt(max(0, patches.shape[1] - prefix))
        if side == 0 or side * side != patches.shape[1] - prefix:
            raise InputError(
                f"{where}: expected {prefix} tokens and a square of patches, found {patches.shape[1]} tokens; the "
                "setting prefix tells how many come before the patches"
            )
        patches = patches[:, prefix:].reshape(len(patches), side, side, patches.shape[2])
    else:
        order = "(B, D, H, W)" if channels_first else "(B, H, W, D)"
        raise InputError(f"{where}: expected patches (B, N, D) or {order}, found shape {patches.shape}")
    if summary is not None:
        summary = np.asarray(summary)
        if summary.ndim != 2 or len(summary) != len(patches):
            raise InputError(f"{where}: expected a summary ({len(patches)}, S), found shape {summary.shape}")
        summary = np.ascontiguousarray(summary, np.float32)
    return ExpertFeatures(np.ascontiguousarray(patches, np.float32), summary)


def make_expert(
    spec: ForeignSpec,
    settings: Settings,
    run: Callable[[np.ndarray], Any],
    weights_hash: str,
    *,
    raw: bool = False,
    channels_first: bool = True,
) -> Expert:
    """Makes an expert of a function; shows it one black picture to learn its shapes.

    Args:
      spec: gives the name and origin.
      settings: the model's, at the size that is wanted.
      run: pixels -> what `to_features` takes. Pixels are float32 (B, 3, S, S), normalised by the view, or as
        `raw` uint8 (B, S, S, 3) RGB.
      weights_hash: of the weights alone.
      raw: see `run`.
      channels_first: of maps that `run` returns.

    Returns:
      A ``host`` expert. Its hash is of the weights, of `prefix`, `outputs` and `files`: with another of them
      a store that was begun is refused.

    Raises:
      InputError: the model fails on the picture, or returns something else.
    """
    view, where = settings.view, f"expert {spec.name} ({spec.origin})"

    def call(pixels: Any) -> ExpertFeatures:
        pixels = np.asarray(pixels)
        if not raw:
            pixels = np.ascontiguousarray(view.normalize(pixels).transpose(0, 3, 1, 2))
        return to_features(run(pixels), settings, where, channels_first=channels_first)

    try:
        found = call(np.zeros((1, view.size, view.size, 3), np.uint8))
    except InputError:
        raise
    except Exception as error:  # whatever a foreign model raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{where}: fails on a picture of {view.size} pixels: {reason}") from error
    card = ExpertCard(
        name=spec.name,
        title=settings.title or spec.origin,
        paper=settings.paper,
        weights=spec.origin,
        licence=settings.licence,
        view=view,
        grid=found.patches.shape[1:3],
        width=found.patches.shape[3],
        summary_width=None if found.summary is None else found.summary.shape[1],
        has_cls_attention=found.cls_attention is not None,
        backend="host",
    )
    return Expert(card, {}, _whole_hash(weights_hash, settings, where), lambda params, pixels: call(pixels))


def _whole_hash(weights_hash: str, settings: Settings, where: str) -> str:
    parts: list[Any] = [weights_hash, settings.prefix, sorted(settings.outputs.items())]
    for file in settings.files:
        try:
            parts.append([file, hashlib.sha256(Path(file).read_bytes()).hexdigest()])
        except OSError as error:
            raise InputError(f"{where}: files: cannot read {file}: {error.strerror}") from error
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def stored_card(spec: ForeignSpec, manifest: Manifest) -> ExpertCard | None:
    """Returns the card of an expert from the store that holds its features, None for another one's store.

    So a run trains where neither torch nor the model is installed. Grid and width are those that are stored.
    """
    if manifest.expert["name"] != spec.name or manifest.expert["weights"] != spec.origin:
        return None
    shapes = manifest.shapes
    view: dict[str, Any] = {**manifest.view, "flip": False}
    told: dict[str, Any] = {**manifest.expert}
    height, width, channels = shapes["patches"]
    return ExpertCard(
        **told,
        view=View(**view),
        grid=(height, width),
        width=channels,
        summary_width=shapes["summary"][0] if "summary" in shapes else None,
        has_cls_attention="cls_attention" in shapes,
        backend="host",
    )
