"""What an expert is: frozen weights, a view, and a contract for what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from tove_jax.data.view import View


class ExpertFeatures(NamedTuple):
    """What one expert says of a batch of pictures.

    Attributes:
      patches: (B, H, W, D) spatial features.
      summary: (B, S) one vector a picture, or None.
      cls_attention: (B, N) attention probabilities from CLS to the patches, mean over heads, CLS's
        own column left out, not renormalised; or None.
      cls_scores: (B, N) mean over heads of the log-probabilities behind `cls_attention` (equal to
        the mean attention score up to a constant a row, which any softmax over patches removes);
        or None.
    """

    patches: Any
    summary: Any | None = None
    cls_attention: Any | None = None
    cls_scores: Any | None = None


@dataclasses.dataclass(frozen=True)
class ExpertCard:
    """What is known of an expert without loading it; docs and model cards are generated from it.

    Attributes:
      name: registered name, a valid folder name.
      title: as people call it.
      paper: citation, with arXiv number where there is one.
      weights: where the published weights come from (package and file, or hub id).
      licence: of the weights, SPDX where there is one.
      view: the published preprocessing.
      grid: (H, W) of the patches.
      width: channels D of the patches.
      summary_width: width of the summary, or None.
      has_cls_attention: whether `cls_attention` and `cls_scores` are given.
      backend: ``jax`` runs inside jit; ``host`` is called with NumPy arrays.
      checked_against: the reference implementation whose numbers the tests compare with.
      parameters: number of weights of the published network, or None where the weights decide it.
    """

    name: str
    title: str
    paper: str
    weights: str
    licence: str
    view: View
    grid: tuple[int, int]
    width: int
    summary_width: int | None = None
    has_cls_attention: bool = False
    backend: Literal["jax", "host"] = "jax"
    checked_against: str = ""
    parameters: int | None = None


@dataclasses.dataclass(frozen=True)
class Expert:
    """A loaded expert, ready to run.

    Attributes:
      card: its description; ``card.view`` is the view that `apply` expects.
      params: pytree of arrays (empty for ``host`` experts).
      weights_hash: hash of the weights as read (see `tove_jax.files.weights.hash_arrays`).
      apply: pure function ``(params, pixels uint8 (B, size, size, 3) RGB, already cut by the view)
        -> ExpertFeatures``; normalises by the view itself. jit-able when ``card.backend == "jax"``,
        otherwise NumPy in, NumPy out.
      extras: further named maps for reports (``{"edges": fn(params, pixels) -> (B, h, w)}``).
      logical_axes: first-match table from parameter paths to logical axis names, by which `params` are sharded
        when the expert runs in the training step; empty: they are replicated.
    """

    card: ExpertCard
    params: Any
    weights_hash: str
    apply: Callable[[Any, Any], ExpertFeatures]
    extras: dict[str, Callable[[Any, Any], Any]] = dataclasses.field(default_factory=dict)
    logical_axes: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
