"""Parts of arrays equal parts of whole ones; unsound files are refused; files are written array by array."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.files import slices
from tove_jax.files.slices import Held, Pending, index_arrays, write_array_files
from tove_jax.files.weights import read_arrays

GOLDENS = Path(__file__).parent.parent / "goldens" / "torch_files"
ARRAYS = {
    "matrix": np.arange(70, dtype=np.float32).reshape(10, 7),
    "half": np.arange(24).reshape(2, 3, 4).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 4), np.float16),
    "flags": np.array([True, False, True]),
}


def save(path, arrays=ARRAYS):
    from safetensors.numpy import save_file

    save_file(arrays, path)
    return path


def test_parts(tmp_path, monkeypatch):
    stored = index_arrays(save(tmp_path / "model.safetensors"))
    monkeypatch.setattr(slices, "CHUNK", 60)  # two rows of the matrix
    for name, array in ARRAYS.items():
        assert stored[name].shape == array.shape
        found = stored[name].read()
        assert found.dtype == array.dtype and found.tobytes() == array.tobytes()
    for index in ((slice(3, 8),), (slice(0, 0),), (slice(None), slice(2, 5)), (slice(9, 10), slice(6, 7))):
        np.testing.assert_array_equal(stored["matrix"].read(index), ARRAYS["matrix"][index])
    room = np.empty((3, 5), np.float64)
    assert stored["matrix"].read((slice(4, 9), slice(1, 4)), out=room.T) is not None
    np.testing.assert_array_equal(room, ARRAYS["matrix"][4:9, 1:4].T)
    with pytest.raises(ValueError, match="step"):
        stored["matrix"].read((slice(0, 4, 2),))
    with pytest.raises(ValueError, match="room"):
        stored["matrix"].read(out=np.empty((2, 2)))


def header(path, content, data=b""):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a sound"),
        (b"[]", "no object"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "not a sound"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "not a sound"),
        ({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, "F8_E4M3"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "does not fit"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "does not fit"),
    ],
)
def test_unsound_headers(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        index_arrays(header(tmp_path / "model.safetensors", content, bytes(8)))


def test_unsound_files(tmp_path):
    path = save(tmp_path / "model.safetensors")
    whole = path.read_bytes()
    stored = index_arrays(path)["matrix"]
    path.write_bytes(whole[:-80])
    with pytest.raises(InputError):
        index_arrays(path)
    path.write_bytes(whole[: stored.offset + 8])
    with pytest.raises(InputError, match="ends before"):
        stored.read()
    for data in (b"", (1 << 40).to_bytes(8, "little")):
        path.write_bytes(data)
        with pytest.raises(InputError, match="not a sound"):
            index_arrays(path)
    for name, message in (("weights.bin", "zip container"), ("weights.npz", "expected .safetensors or .bin")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=message):
            index_arrays(tmp_path / name)


def test_indexes(tmp_path):
    save(tmp_path / "a.safetensors", {"x": ARRAYS["matrix"]})
    index = tmp_path / "model.safetensors.index.json"

    def write(places):
        index.write_text(json.dumps({"weight_map": places}))
        return index

    assert list(index_arrays(write({"x": "a.safetensors"}))) == ["x"]
    for places, message in (
        ({"x": "../a.safetensors"}, "beside the index"),
        ({"x": "b.safetensors"}, "is missing"),
        ({"y": "a.safetensors"}, "'x' is not listed"),
        ({"x": "a.safetensors", "y": "a.safetensors"}, "'y' is not in its shard"),
        (["x"], "weight_map"),
    ):
        with pytest.raises(InputError, match=message):
            index_arrays(write(places))


@pytest.mark.parametrize("shard_bytes", [10**9, 200])
def test_written_files_are_read_by_the_library(tmp_path, shard_bytes):
    pending = {name: Pending(a.dtype, a.shape, lambda a=a: a) for name, a in ARRAYS.items()}
    files = write_array_files(tmp_path, pending, shard_bytes=shard_bytes)
    assert len(files) == (1 if shard_bytes > 1000 else 3)
    found = read_arrays(tmp_path)  # by the safetensors library
    assert sorted(found) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()


def test_what_was_not_announced(tmp_path):
    with pytest.raises(ValueError, match="announced"):
        write_array_files(tmp_path, {"a": Pending(np.dtype(np.float32), (3,), lambda: np.zeros(2, np.float32))})
    with pytest.raises(InputError, match="complex"):
        write_array_files(tmp_path, {"a": Pending(np.dtype(complex), (1,), lambda: np.zeros(1, complex))})


def test_torch_files_in_parts(tmp_path):
    """Tensors of PyTorch's container, found without reading them: equal to those read whole, in shards too."""
    golden = GOLDENS / "contiguous.bin"
    whole = read_arrays(golden)
    found = index_arrays(golden)
    assert sorted(found) == sorted(whole) == ["empty", "half", "nested.ids", "scalar", "window"]
    for name, stored in found.items():
        assert stored.dtype == whole[name].dtype and stored.read().tobytes() == whole[name].tobytes()
    part = found["half"].read([slice(1, 2), slice(0, 3), slice(1, 3)])
    np.testing.assert_array_equal(part, whole["half"][1:, :, 1:3])
    shutil.copy(golden, tmp_path / "pytorch_model-00001-of-00001.bin")
    places = dict.fromkeys(whole, "pytorch_model-00001-of-00001.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert index_arrays(tmp_path)["window"].read().tobytes() == whole["window"].tobytes()
    for name, message in (("zip.pt", "is strided"), ("legacy.pt", "older one")):
        with pytest.raises(InputError, match=message):
            index_arrays(GOLDENS / name)
    (tmp_path / "short.bin").write_bytes(golden.read_bytes()[:-30])
    with pytest.raises(InputError, match="short.bin: damaged"):
        index_arrays(tmp_path / "short.bin")


def test_arrays_in_memory():
    held = Held(ARRAYS["matrix"])
    out = np.empty((2, 7), np.float16)
    assert held.read([slice(3, 5)], out=out) is out and (held.dtype, held.shape) == (np.float32, (10, 7))
    np.testing.assert_array_equal(out, ARRAYS["matrix"][3:5])
    np.testing.assert_array_equal(held.read(), ARRAYS["matrix"])
