"""Batches of conversations: one modality, sorted lengths, few static shapes, nothing lost, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from tove_jax.data.conversation import IGNORED, IMAGE_ID, Encoded
from tove_jax.data.language_batch import (
    collate,
    plan_batches,
    plan_packed,
)
from tove_jax.errors import InputError

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(5, 200, 103)
PICTURED = np.arange(103) % 3 > 0
BUCKETS = (64, 128, 200)


def plan(**settings):
    return plan_batches(LENGTHS, PICTURED, BUCKETS, **{"batch": 8, "seed": 3, **settings})


def rows_of(batches):
    return np.concatenate([batch.rows for batch in batches])


def padding_share(batches, lengths):
    """Returns the share of an epoch's positions that hold no token."""
    places = sum(len(batch.rows) * batch.length for batch in batches)
    return 1 - sum(lengths[batch.rows[batch.rows >= 0]].sum() for batch in batches) / places


def same(left, right):
    return np.array_equal(rows_of(left), rows_of(right))


def row(length, pictures=(), learned=2):
    ids = np.arange(10, 10 + length, dtype=np.int32)
    ids[list(pictures)] = IMAGE_ID
    labels = np.full(length, IGNORED, np.int32)
    labels[length - learned :] = ids[length - learned :]
    return Encoded(ids, labels, np.array(pictures, np.int32))


def test_every_row_comes_once_in_batches_of_one_modality():
    batches = plan()
    rows = rows_of(batches)
    assert sorted(rows[rows >= 0]) == list(range(103)) and (rows < 0).sum() == 104 - 103
    whole = 68 // 8 + 35 // 8
    for batch in batches[:whole]:
        assert PICTURED[batch.rows].all() or not PICTURED[batch.rows].any()
        assert (np.diff(LENGTHS[batch.rows]) <= 0).all()
    # What is left of both comes last, together.
    rest = rows_of(batches[whole:])
    assert len({bool(PICTURED[index]) for index in rest if index >= 0}) == 2
    assert len({PICTURED[batch.rows].any() for batch in batches[: whole // 2]}) == 2
    for batch in batches:
        longest = LENGTHS[batch.rows[batch.rows >= 0]].max()
        assert batch.length == min(bucket for bucket in BUCKETS if bucket >= longest)
    assert len(plan(drop_remainder=True)) == len(batches) - 1


def test_the_plan_is_a_function_of_seed_and_epoch():
    assert same(plan(), plan())
    assert not same(plan(), plan(seed=4)) and not same(plan(), plan(epoch=1))
    assert not same(plan(seed=3, epoch=1), plan(seed=4, epoch=0))
    mixed = plan(by_modality=False)
    assert any(0 < PICTURED[batch.rows].sum() < 8 for batch in mixed[:5])


def test_sorting_over_more_batches_pads_less():
    shares = [padding_share(plan(by_modality=False, window=window), LENGTHS) for window in (1, 13)]
    assert 0 < shares[1] < 0.75 * shares[0]


def test_grouping_by_something_else():
    by_words = plan(group=-LENGTHS)
    assert (np.diff(LENGTHS[by_words[0].rows]) >= 0).all()


def test_arrays_of_a_batch():
    rows = [row(5, (1, 2)), None, row(3)]
    batch = collate(rows, length=6, images=3, pad=7, records=[40, -1, 41])
    shapes = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert shapes == {
        "input_ids": ((3, 6), "int32"),
        "labels": ((3, 6), "int32"),
        "attention_mask": ((3, 6), "bool"),
        "segments": ((3, 6), "int32"),
        "image_positions": ((3, 3), "int32"),
        "image_counts": ((3,), "int32"),
        "record": ((3,), "int32"),
    }
    assert batch["input_ids"].tolist() == [[10, -200, -200, 13, 14, 7], [7] * 6, [10, 11, 12, 7, 7, 7]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 13, 14, -100], [-100] * 6, [-100, 11, 12, -100, -100, -100]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 0, 3]
    assert batch["image_positions"].tolist() == [[1, 2, -1], [-1] * 3, [-1] * 3]
    assert batch["image_counts"].tolist() == [2, 0, 0] and batch["record"].tolist() == [40, -1, 41]


def packed(**settings):
    pictures = np.arange(103) % 3
    return plan_packed(
        LENGTHS, pictures, **{"limit": 256, "pictures_per_row": 4, "batch": 4, "seed": 3, "window": 50, **settings}
    )


def test_packed_rows_hold_every_text_once_within_their_limits():
    pictures = np.arange(103) % 3
    batches = packed()
    shared = [row for batch in batches for row in batch.shared()]
    assert sorted(text for row in shared for text in row) == list(range(103))
    assert max(len(row) for row in shared) > 1 and all(LENGTHS[row].sum() <= 256 for row in shared)
    assert max(pictures[row].sum() for row in shared) <= 4
    assert all(batch.rows.shape == batches[0].rows.shape and batch.length == 256 for batch in batches)
    # No row would have held the texts of a later one besides, of those packed together.
    assert len(packed(window=10**6)) <= len(batches) < len(packed(window=3))
    assert padding_share(batches, LENGTHS) < 0.15 < padding_share(plan(), LENGTHS)
    assert len(packed(pictures_per_row=2)) > len(batches)
    assert len([row for row in shared if not row]) < 4 and len(packed(drop_remainder=True)) >= len(batches) - 1


def test_packing_keeps_its_rows_and_their_number_over_the_epochs():
    first, later = packed(), packed(epoch=1)
    rows = [sorted(map(tuple, np.concatenate([batch.rows for batch in epoch]))) for epoch in (first, later)]
    assert rows[0] == rows[1] and not same(first, later) and same(first, packed())
    assert not same(first, packed(seed=4))


def test_arrays_of_shared_rows():
    texts = [row(3, (1,)), row(4, (0, 2), learned=4)]
    batch = collate([texts, [], texts[0]], length=9, images=3, pad=7, records=[5, -1, 6])
    assert batch["input_ids"][0].tolist() == [10, -200, 12, -200, 11, -200, 13, 7, 7]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 2, 2, 0, 0], [0] * 9, [1, 1, 1, 0, 0, 0, 0, 0, 0]]
    # The second text's first token is not learned: the first text would have to tell it.
    assert batch["labels"][0, 3] == IGNORED and batch["labels"][0, 4:7].tolist() == [11, -200, 13]
    assert batch["image_positions"][0].tolist() == [1, 3, 5] and batch["image_counts"].tolist() == [3, 0, 1]
    assert batch["record"].tolist() == [5, -1, 6] and (batch["attention_mask"] == (batch["segments"] > 0)).all()
    alone = collate([texts[0]], length=9, images=3, pad=7, records=[6])
    assert all((batch[name][2] == alone[name][0]).all() for name in batch)


def test_refusals():
    for settings in ({"batch": 0}, {"window": 0}):
        with pytest.raises(InputError, match="expected rows, positive buckets"):
            plan(**settings)
    with pytest.raises(InputError, match="found 0 rows"):
        plan_batches(LENGTHS[:0], PICTURED[:0], BUCKETS, batch=8, seed=0)
    with pytest.raises(InputError, match="as many lengths as rows"):
        plan_batches(LENGTHS, PICTURED[:5], BUCKETS, batch=8, seed=0)
    with pytest.raises(InputError, match=f"row {LENGTHS.argmax()}: expected at most 128 tokens"):
        plan_batches(LENGTHS, PICTURED, (64, 128), batch=8, seed=0)
    for settings, message in (
        ({"limit": 150}, f"conversation {LENGTHS.argmax()}: expected at most 150 tokens"),
        ({"pictures_per_row": 1}, "conversation 2: expected at most 1 pictures, found 2"),
        ({"batch": 0}, "expected conversations, .* 103, 256, 0 and 50"),
    ):
        with pytest.raises(InputError, match=message):
            packed(**settings)
    with pytest.raises(InputError, match="record 9: expected at most 4 tokens and 1 pictures, found 5 and 2"):
        collate([row(5, (1, 2))], length=4, images=1, pad=0, records=[9])
