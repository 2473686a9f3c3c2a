"""Arrays of a mesh that are written as objects and read onto another mesh."""

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tove_jax.errors import InputError
from tove_jax.files.bucket import Bucket
from tove_jax.train import pieces


@pytest.fixture
def bucket():
    yield Bucket("memory://pieces/run")
    fsspec.filesystem("memory").rm("/pieces", recursive=True)


def placed(values, shape, *axes):
    mesh = jax.make_mesh(shape, ("data", "fsdp"))
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec(*axes)))


def tree(shape, *axes):
    rng = np.random.default_rng(0)
    return {
        "matrix": placed(rng.normal(size=(16, 8)).astype(np.float32), shape, *axes),
        "half": placed(rng.normal(size=(8, 24)).astype(jnp.bfloat16), shape, None, "data"),
        "count": placed(np.int32(3), shape),
        "whole": placed(np.zeros((5,), np.float32), shape),
    }


@pytest.fixture
def written(bucket, monkeypatch):
    """Returns the arrays, and what was written of them, in several parts."""
    monkeypatch.setattr(pieces, "PART_BYTES", 200)
    leaves = pieces.named_leaves(tree((2, 4), "data", "fsdp"))
    index = pieces.write_pieces(bucket, "save/0", pieces.own_pieces(leaves))
    return leaves, index


def test_each_shard_is_written_once_and_read_onto_other_shardings(bucket, written):
    leaves, index = written
    assert bucket.sizes() == index["objects"] and len(index["objects"]) > 2
    assert sum(index["objects"].values()) == sum(leaf.nbytes for leaf in leaves.values())
    saved = pieces.Pieces(bucket, pieces.describe(leaves), index["pieces"], "save")
    like = pieces.named_leaves(tree((4, 2), "fsdp", None))
    for name, leaf in saved.onto(like).items():
        assert leaf.sharding == like[name].sharding and leaf.dtype == leaves[name].dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(leaves[name]))
    whole = saved.whole(lambda name: "matrix" in name)
    (found,) = whole.values()
    np.testing.assert_array_equal(found, np.asarray(leaves["['matrix']"]))


def test_only_what_is_needed_is_read(bucket, written, monkeypatch):
    leaves, index = written
    monkeypatch.setattr(pieces, "_SMALL", -1)
    saved = pieces.Pieces(bucket, pieces.describe(leaves), index["pieces"], "save")
    read, sizes = Bucket.read, []
    monkeypatch.setattr(Bucket, "read", lambda *args: (sizes.append(args[3] - args[2]), read(*args))[1])
    saved.region("['matrix']", ((0, 8), (0, 2)))  # one of the eight shards
    assert sizes == [8 * 2 * 4]


@pytest.mark.parametrize("small", [True, False])
def test_damage_is_told(bucket, written, monkeypatch, small):
    leaves, index = written
    if not small:
        monkeypatch.setattr(pieces, "_SMALL", -1)
    part = next(entry[2] for entry in index["pieces"] if entry[0] == "['matrix']")
    data = bucket.read(part)
    for broken, told in ((data[:-1], "bytes"), (bytes([data[0] ^ 1]) + data[1:], "CRC-32"), (None, "nothing")):
        bucket.remove([part]) if broken is None else bucket.write(part, broken)
        saved = pieces.Pieces(bucket, pieces.describe(leaves), index["pieces"], "save")
        with pytest.raises(InputError, match=f"save: .*: truncated or damaged: expected .*{told}"):
            saved.whole(lambda name: True)
    lacking = [entry for entry in index["pieces"] if entry[0] != "['count']"]
    with pytest.raises(InputError, match="0 of 1 values are there"):
        pieces.Pieces(bucket, pieces.describe(leaves), lacking, "save").region("['count']", ())
