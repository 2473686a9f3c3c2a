"""Manifests: there and back, refusal of what is not one, refusal to mix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts.base import ExpertCard
from tove_jax.experts.manifest import FILE_NAME, Manifest, Moments, describe, hash_ids

CARD = ExpertCard(
    name="hed",
    title="HED",
    paper="a paper",
    weights="a package",
    licence="MIT",
    view=View(size=32),
    grid=(2, 3),
    width=8,
    summary_width=5,
    has_cls_attention=True,
)
IDS = [f"picture {i}" for i in range(10)]


def _manifest(card=CARD, weights="w" * 64, view=None, codec="int8", ids=IDS, shard_records=4, **changes) -> Manifest:
    view = view or card.view
    made = describe(card, weights, view, codec, ids, source="toys", source_licence="CC0", shard_records=shard_records)
    return dataclasses.replace(made, **changes)


def test_there_and_back(tmp_path):
    moments = Moments()
    moments.add_tokens(np.random.default_rng(0).normal(size=(3, 2, 3, 8)))
    manifest = _manifest(complete=True, statistics=moments.statistics())
    (tmp_path / FILE_NAME).write_bytes(manifest.to_json())
    again = Manifest.read(tmp_path)
    assert again == manifest
    assert again.to_json() == manifest.to_json()


def test_shapes_shards_and_sizes():
    manifest = _manifest()
    assert manifest.shapes == {"patches": (2, 3, 8), "summary": (5,), "cls_attention": (6,), "cls_scores": (6,)}
    assert [shard.records for shard in manifest.shards] == [4, 4, 2]
    assert manifest.shards[2].file == "shard-00002-of-00003.records"
    assert manifest.record_bytes == 2 * 3 * (8 + 4) + 4 * (5 + 6 + 6)
    assert manifest.expert["licence"] == "MIT"
    assert hash_ids(IDS) != hash_ids(IDS[::-1]) and hash_ids(["ab", "c"]) != hash_ids(["a", "bc"])


def test_no_ids_and_ids_given_twice():
    with pytest.raises(InputError, match="found none"):
        _manifest(ids=[])
    with pytest.raises(InputError, match="'picture 3' is given twice"):
        _manifest(ids=[*IDS, "picture 3"])
    with pytest.raises(InputError, match="shard_records"):
        _manifest(shard_records=0)


def _edit(**changes):
    return lambda fields: fields.update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit(format=3), "format 2 or before, found format 3"),
        (lambda fields: fields.pop("codec"), "codec"),
        (_edit(surprise=1), "surprise"),
        (_edit(basis=[]), "basis"),
        (_edit(medium="tape"), "field medium: expected mmap, arrayrecord, found 'tape'"),
        (_edit(codec="fp8"), "field arrays"),
        (_edit(records=11), "expected 11 records in all, found 10"),
        (_edit(shapes={"patches": "wide"}), "not a feature store's manifest"),
        (lambda fields: fields["shards"][0].update(file="../x.arrayrecord"), "plain file names"),
    ],
)
def test_what_is_not_a_manifest_is_refused(tmp_path, edit, message):
    fields = json.loads(_manifest().to_json())
    edit(fields)
    (tmp_path / FILE_NAME).write_text(json.dumps(fields))
    with pytest.raises(InputError, match=message) as caught:
        Manifest.read(tmp_path)
    assert str(tmp_path / FILE_NAME) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"'])
def test_no_json_object(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(InputError, match=FILE_NAME):
        Manifest.read(tmp_path)


def test_no_manifest(tmp_path):
    with pytest.raises(InputError, match="tove extract"):
        Manifest.read(tmp_path)


def test_refuses_another_view_naming_both_and_the_difference():
    manifest, other = _manifest(), dataclasses.replace(CARD.view, fit="pad", flip=True)
    with pytest.raises(InputError) as caught:
        manifest.require_same(_manifest(view=other), Path("store"))
    text = str(caught.value)
    for part in ("store", CARD.view.key(), other.key(), "fit is 'crop' in the store and 'pad' now", "flip is False"):
        assert part in text
    assert "size is" not in text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"weights": "v" * 64}, ["w" * 64, "v" * 64]),
        ({"codec": "bf16"}, ["int8", "bf16"]),
        ({"card": dataclasses.replace(CARD, name="sam")}, ["'hed'", "'sam'"]),
        ({"card": dataclasses.replace(CARD, width=9)}, ["(2, 3, 8)", "(2, 3, 9)"]),
        ({"ids": IDS[:9]}, [hash_ids(IDS), hash_ids(IDS[:9]), "10 pictures", "9 pictures"]),
        ({"ids": IDS[::-1]}, [hash_ids(IDS), hash_ids(IDS[::-1])]),
    ],
)
def test_refuses_to_mix_naming_both(changes, parts):
    with pytest.raises(InputError) as caught:
        _manifest().require_same(_manifest(**changes), Path("store"))
    assert all(part in str(caught.value) for part in ["store", *parts])


def test_the_same_is_accepted_with_another_shard_size():
    _manifest().require_same(_manifest(shard_records=3), Path("store"))
    _manifest().require(Path("store"))


def test_identity_follows_what_makes_records_comparable():
    base = _manifest().identity()
    assert base == _manifest(ids=IDS[:3], shard_records=2).identity()
    others = [
        _manifest(weights="v" * 64),
        _manifest(codec="fp8"),
        _manifest(view=CARD.view.flipped()),
        _manifest(card=dataclasses.replace(CARD, width=9)),
    ]
    assert len({base, *(other.identity() for other in others)}) == 5


@pytest.mark.parametrize(("centre", "spread"), [(3, 2), (-1000, 0.5), (0, 1e-12), (1e30, 1e29)])
def test_moments_of_parts_are_those_of_the_whole(centre, spread):
    tokens = np.random.default_rng(0).normal(centre, spread, size=(6, 4, 4, 16)).astype(np.float32)
    total = Moments()
    total.add(Moments().state())
    for part in (tokens[:2], tokens[2:2], tokens[2:]):
        moments = Moments()
        moments.add_tokens(part)
        total.add(json.loads(json.dumps(moments.state(), allow_nan=False)))
    found, exact = total.statistics(), tokens.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(), rtol=1e-6)
    np.testing.assert_allclose(found.std, exact.std(), rtol=1e-5)
    np.testing.assert_allclose(found.norm, np.linalg.norm(exact, axis=-1).mean(), rtol=1e-6)
    assert (found.low, found.high) == (tokens.min(), tokens.max())
    channel_mean = exact.mean((0, 1, 2))
    np.testing.assert_allclose(found.channel_mean, channel_mean, rtol=1e-6)
    np.testing.assert_allclose(found.centred_std, (exact - channel_mean).std(), rtol=1e-5)
    assert Moments().statistics().std == 0
