"""Joining partial stores, and dropping what is no longer wanted; the result appears whole or not at all.

Shards that stay as they are get a hard link or a copy, so joining hosts' stores on one disk costs no space.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tove_jax.config.schema import Config
from tove_jax.data import make_source
from tove_jax.data.split import split
from tove_jax.errors import InputError
from tove_jax.experts.extract import completed
from tove_jax.experts.manifest import (
    BASIS_FILE,
    FILE_NAME,
    PHI_S_FILE,
    Manifest,
    Moments,
    ShardEntry,
    hash_ids,
    shard_name,
)
from tove_jax.experts.run import FLIP_SUFFIX, chosen_experts, store_path
from tove_jax.experts.shards import ShardWriter, claim, index_path, is_done, read_index
from tove_jax.experts.store import FeatureStore, decode_features, find_stores
from tove_jax.files.atomic import atomic_folder, atomic_write_bytes, atomic_write_json

_CHUNK = 16


class _Part(NamedTuple):
    """One shard of the result: a shard of a store, whole, or those of its records that `ids` names."""

    folder: Path
    manifest: Manifest
    number: int
    ids: Sequence[str]
    whole: bool


def merge(paths: Sequence[Path | str], into: Path | str) -> Manifest:
    """Joins stores of one expert into a new one.

    Stores of the same list of pictures are shares of one extraction (``tove extract --share``): their finished
    shards are put together, and the result is unfinished while some are missing; `extract` goes on with it.
    Other stores are put one after the other; a record that stands in several must be the same in all and is
    taken once. The statistics of shards that stay whole are kept, the others' are taken anew from the decoded patches.

    Args:
      paths: folders of the stores, in order.
      into: the new store's folder.

    Returns:
      The new store's manifest.

    Raises:
      InputError: a folder that exists; stores of another expert, weights, view, codec or principal axes; a record
        that differs; with different lists of pictures, a store that is unfinished.
    """
    folders, into = [Path(path) for path in paths], Path(into)
    if len(folders) < 2:
        raise InputError(f"merge: expected two stores or more, found {len(folders)}")
    if into.exists():
        raise InputError(f"{into}: expected a new folder, it exists")
    manifests = [Manifest.read(folder) for folder in folders]
    first = manifests[0]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        manifest.require(
            folder, expert=first.expert["name"], weights_hash=first.weights_hash, codec=first.codec, dtype=first.dtype
        )
        manifest.require(folder, shapes=first.shapes, basis_hash=first.basis_hash)
        kinds = [(each.view_key, each.medium, each.format, each.basis_hash) for each in (first, manifest)]
        if kinds[0] != kinds[1]:
            names = ("view", "medium", "format", "principal axes")
            name, one, other = next((n, a, b) for n, a, b in zip(names, *kinds, strict=True) if a != b)
            raise InputError(f"{folder}: {name} is {other!r}, but {one!r} in {folders[0]}")
    if all((each.ids_hash, _division(each)) == (first.ids_hash, _division(first)) for each in manifests):
        return _union(folders, manifests, into)
    return _write(into, _chained(folders, manifests), sources=[each.source for each in manifests])


def prune(path: Path | str, keep: Callable[[str], bool]) -> tuple[Manifest, int]:
    """Drops records of a finished store; the rest stays in its order.

    Args:
      path: the store's folder.
      keep: id -> whether it stays.

    Returns:
      The manifest, and how many records went. PHI-S's standardisation, fitted on all of them, goes too.

    Raises:
      InputError: the store does not open, none of its records stays, or a record to copy is damaged.
    """
    path = Path(path)
    store = FeatureStore.open(path)
    parts, dropped = [], 0
    for number, ids in enumerate(_shard_ids(path, store.manifest)):
        kept = [id for id in ids if keep(id)]
        dropped += len(ids) - len(kept)
        if kept:
            parts.append(_Part(path, store.manifest, number, kept, len(kept) == len(ids)))
    if not dropped:
        return store.manifest, 0
    if not parts:
        raise InputError(f"{path}: none of its {len(store)} records would stay; remove the folder instead")
    with claim(path / "manifest.lock", wait=True):
        return _write(path, parts, sources=[store.manifest.source]), dropped


def _division(manifest: Manifest) -> list[tuple[str, int]]:
    return [(shard.file, shard.records) for shard in manifest.shards]


def _shard_ids(folder: Path, manifest: Manifest) -> list[list[str]]:
    return [read_index(folder, manifest, number)["ids"] for number in range(len(manifest.shards))]


def _union(folders: Sequence[Path], manifests: Sequence[Manifest], into: Path) -> Manifest:
    """Joins shares of one extraction."""
    first = manifests[0]
    shards = tuple(ShardEntry(shard.file, shard.records) for shard in first.shards)
    result = dataclasses.replace(first, complete=False, statistics=None, shards=shards, phi_s=None, phi_s_hash=None)
    with atomic_folder(into) as temporary:
        for number, shard in enumerate(first.shards):
            for folder, manifest in zip(folders, manifests, strict=True):
                if is_done(folder, manifest, number):
                    _take(folder / shard.file, temporary / shard.file)
                    _take(index_path(folder / shard.file), index_path(temporary / shard.file))
                    break
        if all(is_done(temporary, result, number) for number in range(len(shards))):
            result = completed(temporary, result)
        _write_manifest(temporary, result)
    return result


def _chained(folders: Sequence[Path], manifests: Sequence[Manifest]) -> list[_Part]:
    """Returns the shards of several stores, one after the other, without records that came before."""
    seen: dict[str, tuple[FeatureStore, int]] = {}
    parts = []
    for folder, manifest in zip(folders, manifests, strict=True):
        store = FeatureStore.open(folder)
        for number, ids in enumerate(_shard_ids(folder, manifest)):
            fresh = []
            for id in ids:
                if id not in seen:
                    seen[id] = store, store.crc(id)
                    fresh.append(id)
                elif seen[id][1] != store.crc(id):
                    raise InputError(f"{folder}: record {id!r} differs from the one in {seen[id][0].path}")
            if fresh:
                parts.append(_Part(folder, manifest, number, fresh, len(fresh) == len(ids)))
    return parts


def _write(into: Path, parts: Sequence[_Part], sources: Sequence[str]) -> Manifest:
    """Writes a store of some shards; `into` may be the store they come from."""
    first = parts[0].manifest
    ids = [id for part in parts for id in part.ids]
    entries = tuple(
        ShardEntry(shard_name(number, len(parts), first.medium), len(part.ids)) for number, part in enumerate(parts)
    )
    result = dataclasses.replace(
        first,
        source=", ".join(dict.fromkeys(sources)),
        ids_hash=hash_ids(ids),
        records=len(ids),
        shards=entries,
        complete=False,
        statistics=None,
        phi_s=None,
        phi_s_hash=None,
    )
    stores = {part.folder: FeatureStore.open(part.folder) for part in parts}
    with atomic_folder(into) as temporary:
        for number, (part, entry) in enumerate(zip(parts, entries, strict=True)):
            if part.whole:
                _take(part.folder / part.manifest.shards[part.number].file, temporary / entry.file)
                index = read_index(part.folder, part.manifest, part.number)
                atomic_write_json(index_path(temporary / entry.file), {**index, "file": entry.file}, indent=None)
            else:
                _copy(stores[part.folder], part.ids, temporary, result, number)
        result = completed(temporary, result)
        _write_manifest(temporary, result)
    return result


def _copy(store: FeatureStore, ids: Sequence[str], folder: Path, manifest: Manifest, number: int) -> None:
    moments = Moments()
    with ShardWriter(folder, manifest, number) as writer:
        for start in range(0, len(ids), _CHUNK):
            payloads = {id: store.read(id) for id in ids[start : start + _CHUNK]}
            moments.add_tokens(_patches(manifest, list(payloads.values())))
            for id, payload in payloads.items():
                writer.write(id, payload)
        writer.finish(moments)


def _patches(manifest: Manifest, payloads: Sequence[Mapping[str, Any]]) -> np.ndarray:
    batch = {name: np.stack([payload[name] for payload in payloads]) for name in manifest.arrays}
    return np.asarray(decode_features(manifest, batch).patches)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    for basis, name in ((manifest.basis, BASIS_FILE), (manifest.phi_s, PHI_S_FILE)):
        if basis is not None:
            atomic_write_bytes(folder / name, basis.to_bytes())
    atomic_write_bytes(folder / FILE_NAME, manifest.to_json())


def _take(source: Path, target: Path) -> None:
    """Gives a finished file a second name, or copies it where the disk is another one."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{source}: cannot be copied: {error.strerror}") from error


def unwanted(config: Config, workdir: Path | str) -> dict[Path, frozenset[str] | None]:
    """Returns what a run's features folder holds beyond its settings.

    A mirrored store is judged by the training pictures, and kept when ``data.flip`` is off.

    Args:
      config: the run's settings: its experts, source, split and limit.
      workdir: the run's folder.

    Returns:
      store -> ids of records of other pictures, or None where the expert is not named.

    Raises:
      InputError: no stores there, one that does not open, or a source that does not.
    """
    names = set(chosen_experts(config))
    base = store_path(config, workdir, "clip").parent
    source = make_source(config.data)
    sides = split(source.ids, config.data.held_out, salt=config.data.split_salt, limit=config.data.limit)
    train = {source.ids[int(index)] for index in sides.train}
    everything = train | {source.ids[int(index)] for index in sides.held_out}
    found: dict[Path, frozenset[str] | None] = {}
    for path in find_stores(base):
        name = Manifest.read(path).expert["name"]
        if name not in names:
            found[path] = None
            continue
        wanted = train if path.name.endswith(FLIP_SUFFIX) else everything
        others = frozenset(id for id in FeatureStore.open(path).ids if id not in wanted)
        if others:
            found[path] = others
    return found
