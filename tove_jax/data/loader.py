"""Batches of pictures and expert features, by Grain: shuffled, sliced by process, resumable.

The global order is a function of the seed and the step alone. Each process reads its slice of every
global batch, so the content of a batch does not depend on the number of processes, and the state of
an iterator (the number of batches it has given) is the same in all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from tove_jax.data.dialogue import blank_picture, pictures_of
from tove_jax.data.picture import PictureSource
from tove_jax.data.texts import Texts
from tove_jax.data.view import View
from tove_jax.errors import InputError

CACHE_LIMIT = 256 * 2**20
"""Bytes up to which the student's cut pixels are kept when `cache_pixels` is left open; ours."""
PREFETCH_LIMIT = 2**30
"""Bytes of ready batches above which fewer are kept ready than asked for; ours."""

Batch = dict[str, Any]

_STUDENT = ""  # its view's name among the further ones


class FeatureReader(Protocol):
    """Features of one expert by picture id; safe to read from several threads."""

    def __contains__(self, id: str) -> bool: ...

    def read(self, id: str) -> dict[str, np.ndarray]: ...


def _mix(*numbers: int) -> int:
    """Returns 32 bits from whole numbers, well mixed."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


class _Features:
    """One expert's reader with the shape and dtype that every record must have."""

    def __init__(self, expert: str, reader: FeatureReader, ids: Sequence[str]):
        self.expert, self.reader = expert, reader
        missing = [id for id in ids if id not in reader]
        if missing:
            examples = ", ".join(repr(id) for id in missing[:3])
            raise InputError(
                f"features of expert {expert!r}: expected all {len(ids)} pictures, {len(missing)} are missing, "
                f"such as {examples}"
            )
        self.spec = {key: (value.shape, value.dtype) for key, value in reader.read(ids[0]).items()}

    def read_into(self, arrays: dict[str, np.ndarray], row: int, id: str) -> None:
        record = self.reader.read(id)
        if {key: (value.shape, value.dtype) for key, value in record.items()} != self.spec:
            found = {key: (value.shape, str(value.dtype)) for key, value in record.items()}
            wanted = {key: (shape, str(dtype)) for key, (shape, dtype) in self.spec.items()}
            raise InputError(f"features of expert {self.expert!r}, picture {id!r}: expected {wanted}, found {found}")
        for key, value in record.items():
            arrays[key][row] = value


class _Opened:
    """One picture of the source, decoded when it is first asked for."""

    def __init__(self, source: PictureSource, index: int):
        self.source, self.index = source, index
        self._image: np.ndarray | None = None

    def image(self) -> np.ndarray:
        if self._image is None:
            self._image = self.source[self.index].image
        return self._image


class _Pixels:
    """One view's cut pixels of each picture, plain and mirrored, kept in memory when asked to."""

    def __init__(self, indices: np.ndarray, view: View, *, keep: bool, sides: int):
        self.indices, self.views = indices, (view, view.flipped())[:sides]
        self.keep = keep
        # Plain zeros: the system gives the pages out as they are written.
        shape = (sides, len(indices) if keep else 0)
        self.kept = np.zeros((*shape, view.size, view.size, 3), np.uint8)
        self.done = np.zeros(shape, bool)

    def read(self, position: int, side: int, picture: _Opened) -> np.ndarray:
        if self.keep and self.done[side, position]:
            return self.kept[side, position]
        if not self.keep:
            return self.views[side].cut(picture.image())
        # Both sides at once: decoding costs more than cutting. Two threads may do the same; they write the same.
        for number, view in enumerate(self.views):
            self.kept[number, position] = view.cut(picture.image())
            self.done[number, position] = True
        return self.kept[side, position]

    def __getstate__(self) -> dict[str, Any]:
        empty = np.zeros((len(self.views), len(self.indices)), bool)
        return {**self.__dict__, "kept": np.zeros_like(self.kept), "done": empty} if self.keep else self.__dict__


Slot = tuple[int, int] | None
"""An epoch and a picture's place among the loader's; None for nothing."""


class _ByPicture:
    """Which pictures the local rows of a batch hold: one each, in a shuffled order."""

    width = 1

    def __init__(self, order: grain.MapDataset, total: int, batch: int, rows: range):
        self.order, self.total, self.batch, self.rows = order, total, batch, rows

    def __call__(self, step: int) -> tuple[list[Slot], dict[str, np.ndarray] | None]:
        places = (place + step * self.batch for place in self.rows)
        return [self.order[place] if place < self.total else None for place in places], None


class _ByText:
    """Which pictures the local rows of a batch hold: those of its conversations; and the conversations.

    A text without a picture has the blank one, so that what is computed of every row has something to read.
    """

    def __init__(self, texts: Texts, rows: range, indices: np.ndarray, blank: int | None):
        self.texts, self.rows, self.width = texts, rows, texts.settings.pictures
        self.position = {int(index): position for position, index in enumerate(indices)}
        self.blank = None if blank is None else self.position.get(blank)
        for number in map(int, texts.numbers):
            pictures = pictures_of(texts.dialogues, number)
            known = self.position.keys() >= set(pictures)
            if known and len(pictures) <= self.width and (pictures or self.blank is not None):
                continue
            where = f"conversation {texts.dialogues[number].id!r}"
            if len(pictures) > self.width:
                raise InputError(
                    f"{where}: expected at most {self.width} pictures (config.text.pictures), found {len(pictures)}"
                )
            if not known:
                raise InputError(f"{where}: one of its pictures is not among those that are read")
            raise InputError(f"{where}: has no picture, and the source has no blank one to read in its place")

    def __call__(self, step: int) -> tuple[list[Slot], dict[str, np.ndarray] | None]:
        epoch, planned = self.texts.planned(step)
        slots: list[Slot] = []
        rows: list[list[int]] = []
        shared = planned.shared()
        for place in self.rows:
            numbers = [int(self.texts.numbers[number]) for number in shared[place]]
            rows.append(numbers)
            pictures = [index for number in numbers for index in pictures_of(self.texts.dialogues, number)]
            found: list[Slot] = [(epoch, self.position[index]) for index in pictures]
            if numbers and not found and self.blank is not None:
                found = [(epoch, self.blank)]
            slots += found + [None] * (self.width - len(found))
        return slots, self.texts.arrays(rows, planned.length)


class _Assemble:
    """Makes the local slice of one global batch from its step number."""

    def __init__(
        self,
        plan: _ByPicture | _ByText,
        indices: np.ndarray,
        ids: list[str],
        source: PictureSource,
        cuts: dict[str, _Pixels],
        features: tuple[dict[str, _Features], ...],
        captions: np.ndarray | None,
        pictured: np.ndarray | None,
        seed: int,
    ):
        self.plan = plan
        self.indices, self.ids, self.features, self.seed = indices, ids, features, seed
        self.source, self.cuts = source, cuts
        self.captions, self.pictured = captions, pictured

    def side(self, epoch: int, position: int) -> int:
        """Returns 0 for the plain and 1 for the mirrored picture."""
        return 0 if len(self.features) == 1 else _mix(self.seed, epoch, int(self.indices[position]), 1) & 1

    def __call__(self, step: int) -> Batch:
        slots, text = self.plan(step)
        count = len(slots)
        sizes = {name: cut.views[0].size for name, cut in self.cuts.items()}
        pixels = {name: np.empty((count, size, size, 3), np.uint8) for name, size in sizes.items()}
        mask = np.zeros(count, bool)
        record = np.full(count, -1, np.int32)
        arrays = {
            expert: {key: np.empty((count, *shape), dtype) for key, (shape, dtype) in one.spec.items()}
            for expert, one in self.features[0].items()
        }
        for row, slot in enumerate(slots):
            if slot is None:
                for payload in (pixels, *arrays.values()):
                    for array in payload.values():
                        array[row] = 0
                continue
            epoch, position = slot
            side = self.side(epoch, position)
            picture = _Opened(self.source, int(self.indices[position]))
            for name, cut in self.cuts.items():
                pixels[name][row] = cut.read(position, side, picture)
            for expert, one in self.features[side].items():
                one.read_into(arrays[expert], row, self.ids[position])
            mask[row] = True
            record[row] = self.indices[position]
        result = {"pixels": pixels.pop(_STUDENT), "features": arrays, "mask": mask, "record": record}
        if pixels:
            result["views"] = pixels
        if self.pictured is not None:
            result["has_picture"] = mask & self.pictured[record]
        if self.captions is not None:
            words = np.where(mask[:, None], self.captions[record], -1)
            result |= {"captions": np.maximum(words, 0), "caption_mask": words >= 0}
        if self.plan.width > 1:
            result = _by_row(result, self.plan.width)
        return result if text is None else result | {"text": text}


def _by_row(tree: Any, width: int) -> Any:
    """Splits the leading axis of every array into rows of `width` pictures."""
    if isinstance(tree, dict):
        return {name: _by_row(value, width) for name, value in tree.items()}
    return tree.reshape(-1, width, *tree.shape[1:])


class _Numbered:
    """Puts the epoch beside each position; a class, so that it can be pickled."""

    def __init__(self, count: int):
        self.count = count

    def __call__(self, index: int, position: int) -> tuple[int, int]:
        return index // self.count, position


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches of this process; `iter` gives a Grain iterator.

    Such an iterator has ``get_state()`` and ``set_state(state)``, goes into an Orbax checkpoint by
    ``grain.checkpoint.CheckpointSave(iterator)``, and after restoring gives the batches that the
    saved one would have given. Its state is the number of batches given, the same in every process
    and for every process count. ``close()`` it.

    Attributes:
      dataset: the Grain dataset.
      steps: batches until the end, or None when it repeats for ever.
      batch: rows of a global batch.
      local_batch: rows of this process's slice.
      pictures: pictures an epoch.
      batch_bytes: size of one local batch.
      prefetch: batches kept ready.
    """

    dataset: grain.IterDataset
    steps: int | None
    batch: int
    local_batch: int
    pictures: int
    batch_bytes: int
    prefetch: int

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        """Returns a Grain iterator at the first batch."""
        return iter(self.dataset)


def make_loader(
    source: PictureSource,
    indices: np.ndarray,
    view: View,
    readers: Mapping[str, FeatureReader],
    *,
    batch: int,
    seed: int = 0,
    flip_readers: Mapping[str, FeatureReader] | None = None,
    views: Mapping[str, View] | None = None,
    captions: np.ndarray | None = None,
    texts: Texts | None = None,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = False,
    threads: int = 2,
    prefetch: int = 16,
    process_index: int = 0,
    process_count: int = 1,
    cache_pixels: bool | None = None,
) -> Loader:
    """Makes the loader of one process.

    A batch of the iterator is a dict of NumPy arrays, b = batch / process_count rows:
    ``pixels`` uint8 (b, size, size, 3), the student's cut, not normalised; ``features``
    {expert: payload with a leading b}; ``mask`` bool (b,), False for rows that only fill the last
    batch (zeros, record -1); ``record`` int32 (b,), index into ``source.ids``. Features are found by
    picture id. With `views` there is ``views`` {name: uint8 (b, size, size, 3)}, the same pictures, mirrored
    alike, cut by each of them. A source that knows rows without a picture (LLaVA's text) adds ``has_picture`` bool (b,).
    With `captions` there are ``captions`` int32 (b, L) and ``caption_mask`` bool (b, L), which of
    them are tokens. Row r of process p is row ``p * b + r`` of the global batch.

    With `flip_readers` each picture of each epoch is, by a hash of seed, epoch and record, plain or
    mirrored: then the student's pixels and all experts' features are those of the mirrored picture.

    Training: ``shuffle=True, epochs=None``; another order each epoch, batches cross from one epoch
    into the next. Evaluation: ``shuffle=False, epochs=1``.

    Args:
      source: pictures.
      indices: int (n,), which of the source's records, without repetition.
      view: the student's.
      readers: features by expert.
      batch: global batch, a multiple of `process_count`.
      seed: of order and flips.
      flip_readers: features of the mirrored pictures, the same experts; None: never mirror.
      views: further views of the pictures, not mirrored, by names other than the empty one; a picture is decoded
        once for all of them.
      captions: int32 (len(source), L), the tokens of each record's caption, -1 where there are no more;
        None: none are given.
      texts: conversations; rows are then theirs, in their order, and not pictures. Their batch, seed and epochs
        must be those given here.
      shuffle: else in the order of `indices`.
      epochs: times over the pictures; None: without end.
      drop_remainder: leave an incomplete last batch out instead of filling it up.
      threads: that read, decode and copy.
      prefetch: batches kept ready; fewer when they would take over a GiB, but two at least.
      process_index, process_count: this process among all.
      cache_pixels: keep cut pixels in memory, so that each picture is decoded once; None: of the student's
        view and then each further one, while they take no more than 256 MiB in all.

    Returns:
      The loader.

    Raises:
      InputError: no pictures; sizes that do not fit; features that are missing (naming the expert, how
        many ids and examples); while iterating, a picture that cannot be decoded or a record of
        another shape.
    """
    indices = np.asarray(indices)
    if len(indices) == 0:
        raise InputError("loader: expected pictures, found none: this side of the split is empty")
    if batch <= 0 or process_count <= 0 or batch % process_count:
        raise InputError(f"train.batch: expected a positive multiple of {process_count} processes, found {batch}")
    if not 0 <= process_index < process_count:
        raise InputError(f"loader: expected a process below {process_count}, found {process_index}")
    if epochs is not None and epochs <= 0:
        raise InputError(f"loader: expected one epoch or more, found {epochs}")
    if threads <= 0 or prefetch <= 0:
        raise InputError(f"data.threads and data.prefetch: expected 1 or more, found {threads} and {prefetch}")
    if indices.min() < 0 or indices.max() >= len(source):
        raise InputError(f"loader: expected indices below {len(source)}, found {indices.min()} to {indices.max()}")
    ids = [source.ids[int(index)] for index in indices]
    if len(set(ids)) != len(ids):
        raise InputError("loader: expected each picture once, found an id twice")
    features = [{expert: _Features(expert, reader, ids) for expert, reader in readers.items()}]
    if flip_readers is not None:
        if set(flip_readers) != set(readers):
            raise InputError(f"mirrored features: expected the experts {sorted(readers)}, found {sorted(flip_readers)}")
        mirrored = {expert: _Features(f"{expert}@flip", flip_readers[expert], ids) for expert in readers}
        for expert, one in mirrored.items():
            if one.spec != features[0][expert].spec:
                raise InputError(
                    f"features of expert {one.expert!r}: expected {features[0][expert].spec} as in {expert!r}, "
                    f"found {one.spec}"
                )
        features.append(mirrored)
    if captions is not None and (captions.ndim != 2 or len(captions) != len(source) or captions.dtype != np.int32):
        raise InputError(
            f"loader: captions: expected int32 ({len(source)}, L), found {captions.dtype} {captions.shape}"
        )

    count, local, sides = len(indices), batch // process_count, len(features)
    cuts, picture_bytes, left = {}, 0, CACHE_LIMIT
    for name, shown in {_STUDENT: view, **(views or {})}.items():
        size = shown.size * shown.size * 3
        picture_bytes += size
        keep = count * sides * size <= left if cache_pixels is None else cache_pixels
        left -= count * sides * size if keep else 0
        cuts[name] = _Pixels(indices, shown, keep=keep, sides=sides)
    # Grain seeds epoch e with seed + e: mixing first keeps neighbouring seeds from sharing orders.
    order = grain.MapDataset.range(count).map_with_index(_Numbered(count))
    if shuffle:
        order = order.shuffle(seed=_mix(seed))
    order = order.repeat(epochs)
    total = sys.maxsize if epochs is None else count * epochs
    if texts is not None:
        steps = None if epochs is None else texts.epoch_steps * epochs
    elif epochs is None:
        steps = None
    else:
        steps = total // batch if drop_remainder else -(-total // batch)
        if steps == 0:
            raise InputError(f"loader: expected {batch} pictures or more for a whole batch, found {total}")
    rows = range(process_index * local, (process_index + 1) * local)
    pictured = None if (told := getattr(source, "pictured", None)) is None else np.asarray(told, bool)
    plan: _ByPicture | _ByText
    if texts is None:
        plan = _ByPicture(order, total, batch, rows)
    else:
        plan = _ByText(texts, rows, indices, blank_picture(source))
    assemble = _Assemble(plan, indices.astype(np.int32), ids, source, cuts, tuple(features), captions, pictured, seed)
    record_bytes = picture_bytes + sum(
        int(np.prod(shape)) * np.dtype(dtype).itemsize
        for one in features[0].values()
        for shape, dtype in one.spec.values()
    )
    record_bytes *= plan.width
    ready = min(prefetch, max(2, PREFETCH_LIMIT // (local * record_bytes)))
    dataset = grain.MapDataset.range(sys.maxsize // batch if steps is None else steps).map(assemble)
    return Loader(
        dataset=dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ready)),
        steps=steps,
        batch=batch,
        local_batch=local,
        pictures=count,
        batch_bytes=local * record_bytes,
        prefetch=ready,
    )
