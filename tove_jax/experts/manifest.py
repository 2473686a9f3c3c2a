"""What a feature store says of itself, and the refusal to mix two things in one store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import codecs
from tove_jax.experts.base import ExpertCard
from tove_jax.experts.media import SUFFIXES
from tove_jax.experts.spectrum import Basis, digest

FORMAT = 2
FORMATS = (1, 2)
"""Versions that are read; the first had ArrayRecord files alone and no fitted bases."""
FILE_NAME = "manifest.json"
BASIS_FILE = "basis.safetensors"
"""The axes of a codec with PCA, beside the manifest."""
PHI_S_FILE = "phi_s.safetensors"
"""The standardisation of ``features.standardize="phi_s"``, beside the manifest."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array of a record's payload: shape and the name of its dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * codecs.dtype_of(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One shard: file name, number of records and, once the store is complete, size and SHA-256."""

    file: str
    records: int
    bytes: int | None = None
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of the patch tokens as the expert gave them, before the codec, over all records.

    Attributes:
      mean, std: over all values.
      norm: mean L2 norm of a token.
      low, high: smallest and largest value.
      channel_mean: of every channel, over records and tokens.
      centred_std: over all values, each less its channel's mean.
    """

    mean: float
    std: float
    norm: float
    low: float
    high: float
    channel_mean: tuple[float, ...] = ()
    centred_std: float = 0.0


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a feature store, kept beside its shards as JSON.

    Attributes:
      expert: name, title, paper, weights and licence from the expert's card.
      weights_hash: hash of the weights as read.
      view: every field of the view (`View.describe`).
      view_key: short hash of them (`View.key`).
      codec: how patches are stored.
      shapes: field of `ExpertFeatures` -> shape without the batch axis, in stored order.
      arrays: payload array -> shape and dtype, in stored order; concatenated they are a record.
      source: name of the picture source.
      source_licence: its licence.
      ids_hash: hash of the list of record ids, in order (`hash_ids`).
      records: number of records.
      shard_records: records in every shard but the last.
      shards: one entry a shard.
      complete: whether every shard is written.
      statistics: of the patches; None until complete.
      format: version of this layout.
      medium: kind of the shards' files, see `tove_jax.experts.media`.
      dtype: in which the expert computed.
      basis_hash: of `BASIS_FILE`; None for a codec without PCA.
      phi_s_hash: of `PHI_S_FILE`; None until it was fitted.
      basis, phi_s: what these files hold; read with the manifest, not part of it.
    """

    expert: dict[str, str]
    weights_hash: str
    view: dict[str, Any]
    view_key: str
    codec: str
    shapes: dict[str, tuple[int, ...]]
    arrays: dict[str, ArraySpec]
    source: str
    source_licence: str
    ids_hash: str
    records: int
    shard_records: int
    shards: tuple[ShardEntry, ...]
    complete: bool = False
    statistics: Statistics | None = None
    format: int = FORMAT
    medium: str = "arrayrecord"
    dtype: str = "float32"
    basis_hash: str | None = None
    phi_s_hash: str | None = None
    basis: Basis | None = dataclasses.field(default=None, compare=False, repr=False)
    phi_s: Basis | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def record_bytes(self) -> int:
        """Bytes of one record's payload."""
        return sum(spec.bytes for spec in self.arrays.values())

    def identity(self) -> str:
        """Returns a short hash of what makes two records comparable; every shard's index bears it."""
        parts = {
            "expert": self.expert["name"],
            "weights_hash": self.weights_hash,
            "view_key": self.view_key,
            "codec": self.codec,
            "arrays": {name: [list(spec.shape), spec.dtype] for name, spec in self.arrays.items()},
        }
        if self.basis_hash is not None:
            parts["basis"] = self.basis_hash
        return _digest(parts)[:16]

    def to_json(self) -> bytes:
        """Returns the file's content: the same bytes for equal manifests."""
        names = {field.name for field in dataclasses.fields(self)} - {"basis", "phi_s"}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in names}
        fields["arrays"] = {name: dataclasses.asdict(spec) for name, spec in self.arrays.items()}
        fields["shards"] = [dataclasses.asdict(shard) for shard in self.shards]
        if self.statistics is not None:
            fields["statistics"] = dataclasses.asdict(self.statistics)
        return (json.dumps({"format": fields.pop("format"), **fields}, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, path: Path) -> Manifest:
        """Reads a manifest.

        Args:
          text: content of the file.
          path: where it comes from, for errors.

        Raises:
          InputError: not JSON, another format version, a missing or ill-typed field.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path}: expected JSON, found {error}") from error
        found = fields.get("format") if isinstance(fields, dict) else None
        if found not in FORMATS:
            raise InputError(f"{path}: expected a feature store of format {FORMAT} or before, found format {found!r}")
        try:
            fields["shapes"] = {name: _shape(shape) for name, shape in fields["shapes"].items()}
            fields["arrays"] = {
                name: ArraySpec(_shape(spec["shape"]), spec["dtype"]) for name, spec in fields["arrays"].items()
            }
            fields["shards"] = tuple(ShardEntry(**shard) for shard in fields["shards"])
            if fields["statistics"] is not None:
                fields["statistics"] = Statistics(**_tuples(fields["statistics"]))
            if not {"basis", "phi_s"}.isdisjoint(fields):
                raise KeyError("basis, phi_s")
            manifest = cls(**fields)
            written = codecs.payload_arrays(manifest.codec, manifest.shapes)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{path}: not a feature store's manifest: {type(error).__name__} {error}") from error
        stored = {name: (spec.shape, spec.dtype) for name, spec in manifest.arrays.items()}
        if stored != written:
            raise InputError(f"{path}: field arrays: expected {written} for codec {manifest.codec}, found {stored}")
        total = sum(shard.records for shard in manifest.shards)
        if total != manifest.records:
            raise InputError(f"{path}: field shards: expected {manifest.records} records in all, found {total}")
        if manifest.medium not in SUFFIXES:
            raise InputError(f"{path}: field medium: expected {', '.join(SUFFIXES)}, found {manifest.medium!r}")
        bad = [shard.file for shard in manifest.shards if shard.file != Path(shard.file).name]
        if bad:
            raise InputError(f"{path}: field shards: expected plain file names, found {bad[0]!r}")
        return manifest

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest of a store, and the bases that it names.

        Raises:
          InputError: there is none, or it does not read as one; a basis that is missing or another one.
        """
        path = Path(folder) / FILE_NAME
        try:
            text = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: expected the manifest of a feature store ({error.strerror}); run `tove extract`"
            ) from error
        manifest = cls.from_json(text, path)
        files = {BASIS_FILE: manifest.basis_hash, PHI_S_FILE: manifest.phi_s_hash}
        basis, phi_s = (None if hash is None else _read_basis(path.parent / name, hash) for name, hash in files.items())
        return dataclasses.replace(manifest, basis=basis, phi_s=phi_s)

    def require(
        self,
        where: Path | str,
        *,
        expert: str | None = None,
        weights_hash: str | None = None,
        view: View | None = None,
        codec: str | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        dtype: str | None = None,
        basis_hash: str | None = None,
    ) -> None:
        """Refuses a store that holds something else than what is wanted; None is not compared.

        Args:
          where: the store, for the error.
          expert: registered name.
          weights_hash: as the expert is loaded now.
          view: what the expert is shown now.
          codec: as configured now.
          shapes: field of `ExpertFeatures` -> shape without the batch axis, as stored.
          dtype: in which the expert computes now.
          basis_hash: of the axes that a codec with PCA is to have.

        Raises:
          InputError: names the field, the store's value and the wanted one.
        """
        cure = "remove the store or name another folder"
        if expert is not None and expert != self.expert["name"]:
            raise InputError(f"{where}: holds features of expert {self.expert['name']!r}, not {expert!r}; {cure}")
        if view is not None and view.key() != self.view_key:
            wanted = view.describe()
            differ = ", ".join(
                f"{name} is {self.view.get(name)!r} in the store and {wanted.get(name)!r} now"
                for name in sorted({*wanted, *self.view})
                if self.view.get(name) != wanted.get(name)
            )
            raise InputError(
                f"{where}: extracted with view {self.view_key}, but expert {self.expert['name']!r} is shown view "
                f"{view.key()} now ({differ}); {cure}"
            )
        if weights_hash is not None and weights_hash != self.weights_hash:
            raise InputError(
                f"{where}: extracted with weights {self.weights_hash}, but expert {self.expert['name']!r} has weights "
                f"{weights_hash} now; {cure}"
            )
        if codec is not None and codec != self.codec:
            raise InputError(f"{where}: stored with codec {self.codec}, not {codec}; {cure}")
        if dtype is not None and dtype != self.dtype:
            raise InputError(f"{where}: extracted in {self.dtype}, not {dtype}; {cure}")
        if basis_hash is not None and basis_hash != self.basis_hash:
            raise InputError(
                f"{where}: stored on other principal axes ({self.basis_hash}) than wanted ({basis_hash}); {cure}"
            )
        if shapes is not None:
            wanted = {name: _shape(shape) for name, shape in shapes.items()}
            if wanted != self.shapes:
                raise InputError(f"{where}: holds {self.shapes} a record, but {wanted} is wanted; {cure}")

    def require_same(self, wanted: Manifest, where: Path | str) -> None:
        """Refuses to continue a store that was begun with something else; shards' size and medium may differ.

        Raises:
          InputError: names the field, the store's value and the wanted one.
        """
        self.require(where, expert=wanted.expert["name"], weights_hash=wanted.weights_hash, codec=wanted.codec)
        self.require(where, view=View(**_tuples(wanted.view)), shapes=wanted.shapes, dtype=wanted.dtype)
        self.require(where, basis_hash=wanted.basis_hash)
        if (self.ids_hash, self.records) != (wanted.ids_hash, wanted.records):
            raise InputError(
                f"{where}: begun for {self.records} pictures of {self.source!r} (ids {self.ids_hash}), but "
                f"{wanted.records} pictures of {wanted.source!r} (ids {wanted.ids_hash}) are given now; "
                "remove the store or name another folder"
            )


def describe(
    card: ExpertCard,
    weights_hash: str,
    view: View,
    codec: str,
    ids: Sequence[str],
    *,
    source: str,
    source_licence: str,
    shard_records: int,
    medium: str = "mmap",
    dtype: str = "float32",
    basis: Basis | None = None,
) -> Manifest:
    """Returns the manifest of a store about to be written.

    Args:
      card: of the expert; gives the shapes.
      weights_hash: of the loaded expert.
      view: what the expert is shown.
      codec: how patches are stored.
      ids: record ids, in order.
      source: name of the picture source.
      source_licence: its licence.
      shard_records: records a shard.
      medium: kind of the shards' files.
      dtype: in which the expert computes.
      basis: of a codec with PCA, where it is known already.

    Raises:
      InputError: no ids, an id given twice, an unknown codec or medium, a shard size below 1.
    """
    if medium not in SUFFIXES:
        raise InputError(f"features.medium: expected one of {', '.join(SUFFIXES)}, found {medium!r}")
    if shard_records < 1:
        raise InputError(f"shard_records: expected at least 1, found {shard_records}")
    if not ids:
        raise InputError(f"source {source!r}: expected pictures, found none")
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            raise InputError(f"source {source!r}: record id {id!r} is given twice; ids must be unique")
        seen.add(id)
    height, width = card.grid
    shapes: dict[str, tuple[int, ...]] = {"patches": (height, width, card.width)}
    if card.summary_width is not None:
        shapes["summary"] = (card.summary_width,)
    if card.has_cls_attention:
        shapes["cls_attention"] = shapes["cls_scores"] = (height * width,)
    codec = str(codecs.parse(codec))
    shapes = codecs.stored_shapes(codec, shapes)
    count = -(-len(ids) // shard_records)
    shards = tuple(
        ShardEntry(shard_name(index, count, medium), min(shard_records, len(ids) - index * shard_records))
        for index in range(count)
    )
    return Manifest(
        expert={name: getattr(card, name) for name in ("name", "title", "paper", "weights", "licence")},
        weights_hash=weights_hash,
        view=view.describe(),
        view_key=view.key(),
        codec=codec,
        shapes=shapes,
        arrays={name: ArraySpec(*spec) for name, spec in codecs.payload_arrays(codec, shapes).items()},
        source=source,
        source_licence=source_licence,
        ids_hash=hash_ids(ids),
        records=len(ids),
        shard_records=shard_records,
        shards=shards,
        medium=medium,
        dtype=dtype,
        basis_hash=None if basis is None else digest(basis.to_bytes()),
        basis=basis,
    )


def shard_name(number: int, count: int, medium: str) -> str:
    """Returns a shard's file name."""
    return f"shard-{number:05d}-of-{count:05d}{SUFFIXES[medium]}"


def _read_basis(path: Path, expected: str) -> Basis:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; the store's manifest names it") from error
    if digest(content) != expected:
        raise InputError(f"{path}: expected sha256 {expected}, found {digest(content)}")
    return Basis.from_bytes(content, path)


def hash_ids(ids: Sequence[str]) -> str:
    """Returns a short hash of a list of record ids; order counts."""
    return _digest(list(ids))[:16]


class Moments:
    """Running moments behind `Statistics`; adding batches in the same order gives the same bits.

    Batches are merged by their means and summed squared deviations (Chan, Golub and LeVeque 1983),
    so that a mean far from zero does not drown the deviation.
    """

    def __init__(self) -> None:
        self.values = self.tokens = 0
        self.mean = self.squares = self.norms = 0.0
        self.low, self.high = math.inf, -math.inf
        self.channels: list[float] = []

    def add_tokens(self, tokens: np.ndarray) -> None:
        """Adds tokens (..., D), finite; a batch at a time."""
        tokens = np.asarray(tokens, np.float32)
        if not tokens.size:
            return
        low, high = float(tokens.min()), float(tokens.max())
        # Single precision inside a token is enough and an order faster, but for values whose squares overflow.
        if max(-low, high) > 1e15:
            tokens = tokens.astype(np.float64)
        mean = float(tokens.sum(-1).sum(dtype=np.float64)) / tokens.size
        deviations = tokens - tokens.dtype.type(mean)
        lengths = np.sqrt(np.einsum("...d,...d->...", tokens, tokens), dtype=np.float64)
        self.add(
            {
                "values": tokens.size,
                "tokens": lengths.size,
                "mean": mean,
                "squares": float(np.einsum("...d,...d->...", deviations, deviations).sum(dtype=np.float64)),
                "norms": float(lengths.sum()),
                "low": low,
                "high": high,
                "channels": tokens.reshape(-1, tokens.shape[-1]).sum(0, dtype=np.float64).tolist(),
            }
        )

    def add(self, state: Mapping[str, Any]) -> None:
        """Adds what another one's `state` gave."""
        if not state["values"]:
            return
        values = self.values + state["values"]
        shift = state["mean"] - self.mean
        self.squares += state["squares"] + shift * shift * (self.values * state["values"] / values)
        self.mean += shift * (state["values"] / values)
        self.values = values
        self.tokens += state["tokens"]
        self.norms += state["norms"]
        self.low, self.high = min(self.low, state["low"]), max(self.high, state["high"])
        sums = self.channels or [0.0] * len(state["channels"])
        self.channels = [mine + more for mine, more in zip(sums, state["channels"], strict=True)]

    def state(self) -> dict[str, Any]:
        """Returns the sums, JSON-ready."""
        state = dict(vars(self))
        if not self.values:
            state["low"] = state["high"] = 0.0
        return state

    def statistics(self) -> Statistics:
        """Returns the moments; zeros when nothing was added."""
        if not self.values:
            return Statistics(0.0, 0.0, 0.0, 0.0, 0.0)
        deviation = math.sqrt(self.squares / self.values)
        means = np.asarray(self.channels) / self.tokens
        centred = self.squares / self.values - float(np.square(means - self.mean).mean())
        return Statistics(
            self.mean,
            deviation,
            self.norms / self.tokens,
            self.low,
            self.high,
            tuple(means.tolist()),
            math.sqrt(max(0.0, centred)),
        )


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(side) for side in shape)


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
