"""Batches: joined by id, the same for any process count, resumable, padded, and clear when they cannot be."""

from __future__ import annotations

import itertools
import pickle

import grain
import ml_dtypes
import numpy as np
import pytest

from tove_jax.data.loader import make_loader
from tove_jax.data.picture import Picture
from tove_jax.data.view import View
from tove_jax.errors import InputError

VIEW = View(8)


class Source:
    """Pictures whose left half alone is bright and whose brightness tells the index."""

    name, licence = "numbers", "none"

    def __init__(self, count=10):
        self.ids = [f"id-{(7 * i) % count}" for i in range(count)]
        self.labels = self.captions = [None] * count
        self.reads = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self.reads += 1
        image = np.zeros((8, 8, 3), np.uint8)
        image[:, :4] = 10 * index + 5
        return Picture(self.ids[index], image)


class Reader:
    """Features that tell the id's number and the side; kept in an order of their own."""

    def __init__(self, ids, side=0):
        self.records = {
            id: {
                "patches": np.full((2, 2, 3), int(id[3:]) + 100 * side, ml_dtypes.bfloat16),
                "summary": np.full(4, int(id[3:]), np.float32),
            }
            for id in sorted(ids, reverse=True)
        }

    def __contains__(self, id):
        return id in self.records

    def read(self, id):
        return self.records[id]


@pytest.fixture
def source():
    return Source()


def make(source, indices=None, *, batch=4, flip=False, **options):
    indices = np.arange(len(source)) if indices is None else indices
    readers = {"a": Reader(source.ids), "b": Reader(source.ids)}
    flip_readers = {expert: Reader(source.ids, 1) for expert in readers} if flip else None
    return make_loader(source, indices, VIEW, readers, batch=batch, flip_readers=flip_readers, **options)


def take(loader, count=None):
    iterator = iter(loader)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(leaves(a), leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)


def leaves(batch):
    for key in sorted(batch):
        yield from leaves(batch[key]) if isinstance(batch[key], dict) else [batch[key]]


def test_contract_and_join_by_id(source):
    loader = make(source, np.array([9, 2, 5, 7]), seed=3)
    assert loader.steps is None and loader.local_batch == 4 and loader.pictures == 4
    for batch in take(loader, 3):
        assert sorted(batch) == ["features", "mask", "pixels", "record"]
        assert batch["pixels"].shape == (4, 8, 8, 3) and batch["pixels"].dtype == np.uint8
        assert batch["record"].dtype == np.int32 and sorted(batch["record"]) == [2, 5, 7, 9]
        assert batch["mask"].dtype == bool and batch["mask"].all()
        patches = batch["features"]["b"]["patches"]
        assert patches.shape == (4, 2, 2, 3) and patches.dtype == ml_dtypes.bfloat16
        assert loader.batch_bytes == batch["pixels"].nbytes + 2 * (patches.nbytes + 4 * 4 * 4)
        for row, index in enumerate(batch["record"]):
            assert batch["pixels"][row, 0, 0, 0] == 10 * index + 5
            assert (patches[row] == int(source.ids[index][3:])).all()
            assert (batch["features"]["a"]["summary"][row] == int(source.ids[index][3:])).all()


def test_captions_are_found_by_record(source):
    table = np.stack([np.arange(10), np.where(np.arange(10) % 2, 7, -1)], axis=1).astype(np.int32)
    loader = make(source, np.array([3, 8, 5]), batch=2, captions=table, shuffle=True, epochs=1)
    batches = take(loader)
    assert sorted(int(r) for b in batches for r in b["record"][b["mask"]]) == [3, 5, 8]
    for batch in batches:
        for row, record in enumerate(batch["record"]):
            words = batch["captions"][row][batch["caption_mask"][row]].tolist()
            assert words == ([] if record < 0 else [record, 7] if record % 2 else [record])
        assert batch["captions"].dtype == np.int32 and batch["captions"].min() >= 0
    with pytest.raises(InputError, match=r"captions: expected int32 \(10, L\), found int32 \(9, 2\)"):
        make(source, captions=table[:9])


def test_rows_without_a_picture_are_told(source):
    assert "has_picture" not in take(make(source, shuffle=False, epochs=1))[0]
    source.pictured = [index % 3 != 0 for index in range(len(source))]
    for batch in take(make(source, shuffle=False, epochs=1)):
        wanted = [
            bool(real) and int(record) % 3 != 0 for real, record in zip(batch["mask"], batch["record"], strict=True)
        ]
        np.testing.assert_array_equal(batch["has_picture"], wanted)


def test_a_run_without_experts_has_pictures_alone(source):
    loader = make_loader(source, np.arange(4), VIEW, {}, batch=2, flip_readers={}, epochs=1)
    assert [b["features"] for b in take(loader)] == [{}, {}]


def test_every_epoch_has_each_picture_once_in_another_order(source):
    records = np.concatenate([batch["record"] for batch in take(make(source, seed=1), 10)]).reshape(4, 10)
    assert (np.sort(records) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in records}) == 4
    again = np.concatenate([batch["record"] for batch in take(make(source, seed=1), 10)]).reshape(4, 10)
    np.testing.assert_array_equal(records, again)
    # Neighbouring seeds do not share the orders of shifted epochs.
    other = np.concatenate([batch["record"] for batch in take(make(source, seed=2), 10)]).reshape(4, 10)
    assert not {tuple(epoch) for epoch in records} & {tuple(epoch) for epoch in other}


def test_flip_mirrors_pixels_and_features_together(source):
    sides = []
    for batch in take(make(source, flip=True, seed=5, batch=5), 20):
        for row, index in enumerate(batch["record"]):
            plain = batch["pixels"][row, 0, 0, 0] == 10 * index + 5
            assert batch["pixels"][row, 0, -1, 0] == (0 if plain else 10 * index + 5)
            number = int(source.ids[index][3:])
            for expert in "ab":
                assert batch["features"][expert]["patches"][row, 0, 0, 0] == number + (0 if plain else 100)
            sides.append((index, plain))
    share = np.mean([plain for _, plain in sides])
    assert 0.3 < share < 0.7
    assert len(set(sides)) > 15  # the choice of a picture changes from epoch to epoch


@pytest.mark.parametrize("options", [{"seed": 4, "flip": True}, {"shuffle": False, "epochs": 1}])
def test_processes_share_one_global_order(source, options):
    whole = take(make(source, **options), 3)
    for count in (2, 4):
        parts = [take(make(source, process_index=i, process_count=count, **options), 3) for i in range(count)]
        for step, batch in enumerate(whole):
            for key in ("pixels", "record", "mask"):
                np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), batch[key])
            together = np.concatenate([part[step]["features"]["a"]["patches"] for part in parts])
            np.testing.assert_array_equal(together, batch["features"]["a"]["patches"])


def test_evaluation_is_sequential_and_padded(source):
    loader = make(source, np.array([3, 1, 8, 0, 6]), shuffle=False, epochs=1)
    first, last = take(loader)
    assert loader.steps == 2
    np.testing.assert_array_equal(first["record"], [3, 1, 8, 0])
    np.testing.assert_array_equal(last["record"], [6, -1, -1, -1])
    np.testing.assert_array_equal(last["mask"], [True, False, False, False])
    assert not last["pixels"][1:].any() and not last["features"]["a"]["patches"][1:].any()
    assert make(source, np.arange(5), epochs=1, drop_remainder=True).steps == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_resumed_batches_are_identical(source, threads):
    options = {"seed": 6, "flip": True, "threads": threads}
    iterator = iter(make(source, **options))
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    expected = list(itertools.islice(iterator, 6))
    iterator.close()
    resumed = iter(make(source, process_index=0, process_count=1, prefetch=2, **options))
    resumed.set_state(state)
    assert_same(list(itertools.islice(resumed, 6)), expected)
    resumed.close()
    # The state holds for another number of processes.
    half = iter(make(source, process_index=1, process_count=2, **options))
    half.set_state(state)
    np.testing.assert_array_equal(next(half)["record"], expected[0]["record"][2:])
    half.close()


def test_state_goes_through_orbax(source, tmp_path):
    import orbax.checkpoint as ocp

    iterator = iter(make(source, seed=7))
    for _ in range(3):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = [next(iterator) for _ in range(3)]
        other = iter(make(source, seed=7))
        next(other)
        manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other)))
    assert_same([next(other) for _ in range(3)], expected)
    iterator.close()
    other.close()


@pytest.mark.parametrize("flip", [False, True])
def test_kept_pixels_are_the_same_and_decoded_once(source, flip):
    options = {"seed": 8, "flip": flip, "threads": 1}
    fresh = take(make(source, cache_pixels=False, **options), 9)
    assert source.reads >= 36
    other = Source()
    assert_same(take(make(other, cache_pixels=True, **options), 9), fresh)
    assert other.reads == 10


def test_survives_pickling(source):
    loader = make(source, seed=9, flip=True)
    expected = take(loader, 3)
    data = pickle.dumps(loader.dataset)
    iterator = iter(pickle.loads(data))
    assert_same(list(itertools.islice(iterator, 3)), expected)
    iterator.close()


def test_prefetch_is_bounded_by_memory(source, monkeypatch):
    assert make(source, prefetch=16).prefetch == 16
    monkeypatch.setattr("tove_jax.data.loader.PREFETCH_LIMIT", 3 * make(source).batch_bytes)
    assert make(source, prefetch=16).prefetch == 3


def test_missing_features_name_the_expert_how_many_and_which(source):
    readers = {"a": Reader(source.ids), "hed": Reader(source.ids[:8])}
    with pytest.raises(InputError, match=f"expert 'hed': .* all 10 .*, 2 are missing.*'{source.ids[8]}'"):
        make_loader(source, np.arange(10), VIEW, readers, batch=2)
    make_loader(source, np.arange(8), VIEW, readers, batch=2)
    with pytest.raises(InputError, match="expert 'hed@flip': .* 2 are missing"):
        whole = {"a": Reader(source.ids), "hed": Reader(source.ids)}
        make_loader(source, np.arange(10), VIEW, whole, flip_readers=readers, batch=2)


def test_another_shape_is_named(source):
    reader = Reader(source.ids)
    reader.records["id-3"] = {"patches": np.zeros((2, 3, 3), ml_dtypes.bfloat16), "summary": np.zeros(4, np.float32)}
    with pytest.raises(InputError, match=r"expert 'a', picture 'id-3': .*\(2, 2, 3\).* found .*\(2, 3, 3\)"):
        take(make_loader(source, np.arange(10), VIEW, {"a": reader}, batch=2), 5)


def test_a_broken_picture_stops_the_iterator_by_name(source):
    class Broken(Source):
        def __getitem__(self, index):
            if index == 6:
                raise InputError("picture six: corrupt")
            return super().__getitem__(index)

    with pytest.raises(InputError, match="picture six: corrupt"):
        take(make(Broken(), shuffle=False, epochs=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": np.array([], int)}, "found none"),
        ({"batch": 5, "process_count": 2}, "multiple of 2 processes, found 5"),
        ({"process_index": 2, "process_count": 2}, "below 2, found 2"),
        ({"indices": np.array([10])}, "indices below 10"),
        ({"indices": np.array([1, 1])}, "an id twice"),
        ({"epochs": 0}, "found 0"),
        ({"batch": 16, "epochs": 1, "drop_remainder": True}, "16 pictures or more"),
        ({"threads": 0}, "data.threads"),
    ],
)
def test_sizes_that_do_not_fit(source, options, message):
    with pytest.raises(InputError, match=message):
        make(source, **options)


def test_flip_readers_must_be_the_same_experts(source):
    readers = {"a": Reader(source.ids)}
    with pytest.raises(InputError, match=r"expected the experts \['a'\], found \['b'\]"):
        make_loader(source, np.arange(10), VIEW, readers, batch=2, flip_readers={"b": Reader(source.ids)})
