"""An expert as a row of a table: card, network, names of the published weights, features."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.errors import InputError
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures
from tove_jax.files.weights import hash_arrays, read_arrays
from tove_jax.hf.load import locate
from tove_jax.hf.rules import Rule, flatten, to_tree, unflatten

DTYPES = ("float32", "bfloat16", "float16")
"""In which an expert may compute."""


@dataclasses.dataclass(frozen=True)
class Published:
    """One published expert.

    Attributes:
      card: as published; ``card.weights`` is the hub id, or tells where the file comes from.
      build: input size in pixels -> module; called as ``module.init(key, pixels)``, its attribute ``dtype`` is
        the compute dtype.
      rules: published names <-> the module's tree.
      features: ``(module, params, pixels float32 (B, size, size, 3) normalised) -> ExpertFeatures``, pure.
      ignore: regular expressions of published names that are left out on purpose.
      canonical: brings other spellings to the names of `rules` first.
      adapt: ``(tree at the published size, module at another size) -> tree``, such as a resize of position
        embeddings; None: the tree does not depend on the size.
      multiple: sizes must be multiples of this.
      file: file of the hub repository that holds the weights, where it is none of the usual ones.
      extras: further named maps ``(module, params, pixels normalised) -> array``, for reports.
      also: tables of other names under which the same weights are published; that table is used which
        knows the most of the names found.
    """

    card: ExpertCard
    build: Callable[[int], nn.Module]
    rules: tuple[Rule, ...]
    features: Callable[[nn.Module, Any, jax.Array], ExpertFeatures]
    ignore: tuple[str, ...] = ()
    canonical: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None
    adapt: Callable[[dict[str, Any], nn.Module], dict[str, Any]] | None = None
    multiple: int = 1
    file: str | None = None
    extras: Mapping[str, Callable[[nn.Module, Any, jax.Array], Any]] = dataclasses.field(default_factory=dict)
    also: tuple[tuple[Rule, ...], ...] = ()

    def abstract(self, size: int | None = None) -> dict[str, Any]:
        """Returns the tree of parameters at an input size as `jax.ShapeDtypeStruct`; nothing is computed."""
        size = size or self.card.view.size
        return _abstract(self.build(size), size)

    def shapes(self, size: int | None = None) -> dict[str, tuple[int, ...]]:
        """Returns path and shape of every parameter at an input size; nothing is computed."""
        return {path: leaf.shape for path, leaf in flatten(self.abstract(size)).items()}

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns name and shape of every published array that is used."""
        return _names(self.rules, self.shapes())

    def describe(self, *, weights: Path | None = None, size: int | None = None, dtype: str = "float32") -> ExpertCard:
        """Returns the card of the expert that `load` would give; same arguments and errors, nothing is read."""
        self._check(size, dtype)
        card = self.card
        if size is None or size == card.view.size:
            return card
        resize = card.view.resize and round(card.view.resize * size / card.view.size)
        view = dataclasses.replace(card.view, size=size, resize=resize)
        module = self.build(size)
        tree = _abstract(module, size)
        run = functools.partial(self.features, module)
        found = jax.eval_shape(run, tree, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        return dataclasses.replace(card, view=view, grid=found.patches.shape[1:3], parameters=parameters)

    def load(self, *, weights: Path | None = None, size: int | None = None, dtype: str = "float32") -> Expert:
        """Loads the expert.

        Args:
          weights: folder, file or hub id; None: fetched from the hub under ``card.weights``.
          size: pixels a side, where it is not the published one.
          dtype: compute dtype, ``float32``, ``bfloat16`` or ``float16``; parameters stay float32.

        Returns:
          The expert; its hash is of the parameters as used.

        Raises:
          InputError: a size or dtype that is not possible, no such weights, or weights that do not fit.
        """
        card = self.describe(size=size, dtype=dtype)
        params = self.read(weights, card.view.size)
        return self.expert(card, jax.tree.map(jnp.asarray, params), hash_arrays(flatten(params)), dtype)

    def expert(self, card: ExpertCard, params: Any, weights_hash: str, dtype: str = "float32") -> Expert:
        """Returns the expert of given parameters, which may be shapes alone.

        Args:
          card: as `describe` gives it.
          params: tree of the module at the card's size.
          weights_hash: of them.
          dtype: compute dtype.
        """
        module = self.build(card.view.size).clone(dtype=jnp.dtype(dtype))

        def bind(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
            return lambda params, pixels: function(module, params, card.view.normalize(pixels))

        extras = {name: bind(function) for name, function in self.extras.items()}
        # Each family's module has its table of logical axes.
        axes = getattr(sys.modules[type(module).__module__], "LOGICAL_AXES", ())
        return Expert(card, params, weights_hash, bind(self.features), extras, axes)

    def read(self, weights: Path | str | None = None, size: int | None = None) -> dict[str, Any]:
        """Reads published weights into the module's tree, float32.

        Arguments and errors as `load`.
        """
        path = self._find(weights)
        arrays = read_arrays(path)
        if self.canonical is not None:
            arrays = self.canonical(arrays)
        shapes = self.shapes()
        rules = max((self.rules, *self.also), key=lambda table: len(arrays.keys() & _names(table, shapes)))
        tree = to_tree(arrays, rules, shapes, ignore=self.ignore, source=str(path))
        leaves = flatten(tree)
        for name, leaf in leaves.items():
            if leaf.dtype.kind not in "fV":  # ml_dtypes' bfloat16 and float8 are of kind V
                raise InputError(f"{path}: {name} has dtype {leaf.dtype}, expected floating point")
            if not np.isfinite(leaf.astype(np.float32, copy=False)).all():
                raise InputError(f"{path}: {name}: expected finite numbers, found NaN or Inf")
        tree = unflatten({name: leaf.astype(np.float32) for name, leaf in leaves.items()})
        if size is None or size == self.card.view.size:
            return tree
        if self.adapt is not None:
            tree = self.adapt(tree, self.build(size))
        found = {name: np.shape(leaf) for name, leaf in flatten(tree).items()}
        if found != self.shapes(size):
            raise ValueError(f"expert {self.card.name}: the tree does not fit an input of {size} pixels")
        return tree

    def _find(self, weights: Path | str | None) -> Path:
        source = weights if weights is not None else self.card.weights
        path = Path(source).expanduser()
        if path.is_file():
            return path
        try:
            folder = locate(source, self.file)
        except InputError as error:
            raise InputError(
                f"expert {self.card.name}: {error}; expected a folder, a file or a hub id, such as the published "
                f"weights: {self.card.weights}"
            ) from error
        own = folder / self.file if self.file else None
        return own if own is not None and own.is_file() else folder

    def _check(self, size: int | None, dtype: str) -> None:
        name = self.card.name
        allowed = isinstance(size, int) and size > 0 and size % self.multiple == 0
        if not (size is None or size == self.card.view.size or allowed):
            raise InputError(f"expert {name}: size: expected a positive multiple of {self.multiple}, found {size!r}")
        if dtype not in DTYPES:
            raise InputError(f"expert {name}: dtype: expected {', '.join(DTYPES)}, found {dtype!r}")


def _names(rules: tuple[Rule, ...], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    by_path = {rule.path: rule for rule in rules}
    return {
        name: by_path[path].published_shape(shape)
        for path, shape in shapes.items()
        for name in by_path[path].names(shape)
    }


def _abstract(module: nn.Module, size: int) -> dict[str, Any]:
    pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
