"""What is computed once over a finished store and kept beside its manifest; and what codecs do to its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tove_jax.errors import InputError
from tove_jax.experts import codecs, pooling
from tove_jax.experts.manifest import FILE_NAME, PHI_S_FILE, Manifest
from tove_jax.experts.shards import claim, writing
from tove_jax.experts.spectrum import Basis, Covariance, digest, phi_s, principal
from tove_jax.experts.store import FeatureStore, summary
from tove_jax.files.atomic import atomic_write_bytes

Item = TypeVar("Item")

FIT_RECORDS = 512
"""Records on which axes are fitted at most; ours."""
_CHUNK = 16

CODECS = ("float32", "bf16", "fp8", "int8", "int4:32", "int4", "int4:128")
"""Codecs that `statistics` measures on every store."""


def covariance(store: FeatureStore, ids: Sequence[str]) -> Covariance:
    """Returns the covariance of the decoded patches of some records."""
    found = Covariance()
    for start in range(0, len(ids), _CHUNK):
        if found.full():
            break
        found.add(np.asarray(store.features(ids[start : start + _CHUNK]).patches))
    return found


def spread(items: Sequence[Item], records: int) -> Sequence[Item]:
    """Returns some of the items, evenly spread."""
    return items[:: max(1, len(items) // max(1, records))][: max(1, records)]


def fit_phi_s(path: Path | str) -> Manifest:
    """Fits PHI-S's standardisation on records spread over a store, unless it is there; returns the manifest.

    Raises:
      InputError: the store does not open, or its folder cannot be written.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    if manifest.phi_s is not None:
        return manifest
    with writing(path), claim(path / "manifest.lock", wait=True):
        store = FeatureStore.open(path)
        manifest = store.manifest
        if manifest.phi_s is None:
            basis = phi_s(covariance(store, spread(store.ids, FIT_RECORDS)))
            content = basis.to_bytes()
            atomic_write_bytes(path / PHI_S_FILE, content)
            manifest = dataclasses.replace(manifest, phi_s=basis, phi_s_hash=digest(content))
            atomic_write_bytes(path / FILE_NAME, manifest.to_json())
    return manifest


@dataclasses.dataclass(frozen=True)
class CodecError:
    """What a codec costs and loses on some tokens.

    Attributes:
      bytes: stored bytes a record of these tokens.
      relative: root of (sum of squared errors / sum of squares).
      largest: largest absolute error.
    """

    bytes: float
    relative: float
    largest: float


def reconstruction_error(codec: str, tokens: Any, basis: Basis | None = None) -> CodecError:
    """Returns a codec's cost and its error on ``tokens`` (records, H, W, D) float32.

    What was pooled is compared cell by cell with the grid it came from.
    """
    tokens = np.asarray(tokens, np.float32)
    payload = codecs.encode(codec, tokens, basis=basis)
    decoded = codecs.decode(codec, payload, width=tokens.shape[-1], basis=basis)
    if codecs.parse(codec).pool:
        decoded = pooling.unpool(decoded, *tokens.shape[-3:-1])
    error = decoded.astype(np.float64) - tokens
    power = float(np.sum(np.square(tokens, dtype=np.float64)))
    return CodecError(
        bytes=sum(value.nbytes for value in payload.values()) / max(1, len(tokens)),
        relative=float(np.sqrt(np.sum(np.square(error)) / power)) if power else 0.0,
        largest=float(np.max(np.abs(error), initial=0.0)),
    )


def codec_basis(codec: str, store: FeatureStore, measured: Sequence[str]) -> Basis | None:
    """Fits the axes that a codec with PCA needs on records of a store, but for those that are measured.

    Raises:
      InputError: more axes than channels, or no other records.
    """
    parsed = codecs.parse(codec)
    if parsed.pca is None:
        return None
    taken = set(measured)
    others = [id for id in store.ids if id not in taken]
    if not others:
        raise InputError(f"{store.path}: codec {codec}: no records left to fit its axes on")
    return principal(covariance(store, spread(others, FIT_RECORDS)), parsed.pca)


def statistics(path: Path | str, records: int = 64, measured: Sequence[str] = CODECS) -> str:
    """Returns a store's moments, and what codecs cost and lose on some of its patches, as text.

    The errors are measured on the patches as stored, so those of a store that is not float32 come
    on top of its own codec's.

    Args:
      path: folder of the store.
      records: on how many records, spread over the store, the codecs are measured.
      measured: the codecs.

    Raises:
      InputError: the store does not open, or a record is damaged.
    """
    store = FeatureStore.open(path)
    manifest, moments = store.manifest, store.manifest.statistics
    ids = spread(store.ids, records)
    patches = np.asarray(store.features(ids).patches)
    lines = [summary(path), f"  bytes a record: {manifest.record_bytes}"]
    if moments is not None:
        lines.append(
            f"  patches: mean {moments.mean:.4g}, std {moments.std:.4g}, token norm {moments.norm:.4g}, "
            f"from {moments.low:.4g} to {moments.high:.4g}"
        )
    for codec in dict.fromkeys(str(codecs.parse(codec)) for codec in measured):
        error = reconstruction_error(codec, patches, codec_basis(codec, store, ids))
        lines.append(
            f"  {codec:8s} {error.bytes:10.0f} bytes of patches a record, relative error {error.relative:.2e}, "
            f"largest {error.largest:.3g}{'  (stored so)' if codec == manifest.codec else ''}"
        )
    return "\n".join(lines)
