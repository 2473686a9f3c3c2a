"""The split depends on ids alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tove_jax.data.picture import BLANK
from tove_jax.data.split import fraction, split, spread
from tove_jax.errors import InputError

IDS = [f"picture-{i}" for i in range(2000)]


def held_ids(ids, **options):
    return {ids[i] for i in split(ids, 0.25, **options).held_out}


def test_fraction_is_the_documented_hash():
    digest = hashlib.sha256(b"salt\0name").hexdigest()
    assert fraction("name", "salt") == int(digest[:16], 16) // 2**11 / 2**53
    assert 0 <= min(map(fraction, IDS)) and max(map(fraction, IDS)) < 1


def test_sides_are_disjoint_complete_and_near_the_share():
    train, held_out = split(IDS, 0.25)
    assert sorted([*train, *held_out]) == list(range(len(IDS)))
    assert abs(len(held_out) / len(IDS) - 0.25) < 0.03
    assert train.dtype == np.int32 and (np.diff(train) > 0).all()


def test_independent_of_order_and_count():
    assert held_ids(IDS[::-1]) == held_ids(IDS)
    assert held_ids(IDS[:700]) == held_ids(IDS) & set(IDS[:700])
    assert {IDS[i] for i in split(IDS, 0.1).held_out} < held_ids(IDS)


def test_salt_changes_it_and_nothing_else_does():
    assert held_ids(IDS) == held_ids(IDS)
    assert held_ids(IDS, salt="other") != held_ids(IDS)


def test_limit_is_spread_evenly():
    train, held_out = split(IDS, 0.25, limit=100)
    assert sorted([*train, *held_out]) == list(range(0, 2000, 20))
    assert len(set(spread(7, 5))) == 5
    assert len(split(IDS, 0.25, limit=9999).train) == len(split(IDS, 0.25).train)


def test_the_black_picture_trains_beside_the_limit():
    for salt in "abcdef":
        plain, blank = split(IDS, 0.9, salt=salt, limit=50), split([*IDS, BLANK], 0.9, salt=salt, limit=50)
        assert blank.train.tolist() == [*plain.train, 2000] and blank.held_out.tolist() == plain.held_out.tolist()


@pytest.mark.parametrize("options", [{"held_out": 1.5}, {"held_out": 0.1, "limit": -1}])
def test_bad_settings_are_named(options):
    with pytest.raises(InputError, match="data\\.(held_out|limit)"):
        split(IDS, **options)


def test_ends_of_the_share():
    assert len(split(IDS, 0.0).held_out) == 0
    assert len(split(IDS, 1.0).train) == 0
