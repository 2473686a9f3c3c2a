"""Weights files: every container, and what must be refused."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tove_jax.errors import InputError
from tove_jax.files.torch_pickle import read_torch
from tove_jax.files.weights import find_weights, hash_arrays, hash_file, read_arrays

GOLDENS = Path(__file__).parent.parent / "goldens" / "torch_files"


def expected_arrays() -> dict[str, np.ndarray]:
    base = np.arange(24).reshape(2, 3, 4)
    arrays = {
        name: base.astype(name)
        for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
    }
    arrays["bfloat16"] = base.astype(ml_dtypes.bfloat16)
    arrays["complex64"] = (base + 1j).astype(np.complex64)
    arrays["transposed"] = base.astype(np.float32).transpose(2, 0, 1)
    arrays["window"] = base.astype(np.float32)[1:, ::2, 1:3]
    arrays["expanded"] = np.broadcast_to(np.float32([[1.0], [2.0]]), (2, 3))
    arrays["scalar"] = np.array(3.5, np.float32)
    arrays["empty"] = np.zeros((0, 4), np.float32)
    arrays["parameter"] = base.astype(np.float32)[0]
    return arrays


def torch_tensors(torch) -> collections.OrderedDict:
    base = torch.arange(24).reshape(2, 3, 4)
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors = collections.OrderedDict((name, base.to(getattr(torch, name))) for name in names)
    tensors["complex64"] = (base + 1j).to(torch.complex64)
    shared = base.float()
    tensors["transposed"] = shared.permute(2, 0, 1)
    tensors["window"] = shared[1:, ::2, 1:3]
    tensors["expanded"] = torch.tensor([[1.0], [2.0]]).expand(2, 3)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["parameter"] = torch.nn.Parameter(shared[0])
    return tensors


def check_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
def test_committed_torch_files(name):
    check_equal(read_arrays(GOLDENS / name), expected_arrays())


@pytest.mark.parametrize("zipped", [True, False])
def test_against_torch_save(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    tensors = torch_tensors(torch)
    torch.save(tensors, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    check_equal(read_arrays(tmp_path / "a.bin"), expected_arrays())
    torch.save(
        {"epoch": 3, "note": "x", "state_dict": tensors}, tmp_path / "b.pth", _use_new_zipfile_serialization=zipped
    )
    check_equal(read_arrays(tmp_path / "b.pth"), expected_arrays())
    new = {"a": {"b": [torch.ones(2, dtype=torch.uint16), torch.ones(3).to(torch.float8_e4m3fn)]}}
    torch.save(new, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    found = read_arrays(tmp_path / "c.pt")
    assert found["a.b.0"].dtype == np.uint16 and found["a.b.1"].dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(found["a.b.1"].astype(np.float32), np.ones(3))


class Evil:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def write_zip(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for name, data in (records or {}).items():
            archive.writestr(f"archive/data/{name}", data)


def write_legacy(path: Path, pickled: bytes):
    heads = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    path.write_bytes(b"".join(pickle.dumps(head, 2) for head in heads) + pickled + pickle.dumps([], 2))


@pytest.mark.parametrize("writer", [write_zip, write_legacy])
@pytest.mark.parametrize("function", [os.system, open, eval, os.mkdir])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, writer, function):
    trace = tmp_path / "trace"
    argument = {
        os.system: f"touch {trace}",
        open: str(trace),
        eval: f"open({str(trace)!r}, 'w')",
        os.mkdir: str(trace),
    }[function]
    args = (argument, "w") if function is open else (argument,)
    writer(tmp_path / "evil.bin", pickle.dumps({"w": Evil(function, *args)}, 2))
    with pytest.raises(InputError, match=rf"evil\.bin: refused.*{function.__name__}"):
        read_arrays(tmp_path / "evil.bin")
    assert not trace.exists()


def test_code_hidden_in_a_persistent_id_or_in_the_first_pickle_is_refused(tmp_path):
    trace = tmp_path / "trace"
    call = pickle.dumps(Evil(os.mkdir, str(trace)), 2)
    (tmp_path / "a.bin").write_bytes(call)
    write_zip(tmp_path / "b.bin", call[:-1] + b"Q.")  # BINPERSID of the result
    for name in ("a.bin", "b.bin"):
        with pytest.raises(InputError, match="refused"):
            read_arrays(tmp_path / name)
    assert not trace.exists()


def tensor_pickle(shape, strides, offset=0, numel=6, storage="FloatStorage") -> bytes:
    """A pickle of {"w": tensor} written by hand, so that it can lie."""

    class Pickler(pickle._Pickler):
        def save_global_text(self, module, name):
            self.write(f"c{module}\n{name}\n".encode())

    stream = io.BytesIO()
    pickler = Pickler(stream, 2)
    stream.write(b"\x80\x02}")
    pickler.save("w")
    pickler.save_global_text("torch._utils", "_rebuild_tensor_v2")
    stream.write(b"((")
    pickler.save("storage")
    pickler.save_global_text("torch", storage)
    for value in ("0", "cpu", numel):
        pickler.save(value)
    stream.write(b"tQ")
    for value in (offset, shape, strides, False, None):
        pickler.save(value)
    stream.write(b"tRs.")
    return stream.getvalue()


def test_hand_written_pickle_reads(tmp_path):
    write_zip(tmp_path / "w.pt", tensor_pickle((2, 3), (3, 1)), {"0": np.arange(6, dtype=np.float32).tobytes()})
    np.testing.assert_array_equal(read_arrays(tmp_path / "w.pt")["w"], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"shape": (2, 4), "strides": (3, 1)}, 24, "reaches beyond"),
        ({"shape": (2, 3), "strides": (3, 1), "offset": 1}, 24, "reaches beyond"),
        ({"shape": (2, 3), "strides": (-3, 1), "offset": 3}, 24, "malformed"),
        ({"shape": (2, 3), "strides": (3, 1), "offset": -1}, 24, "malformed"),
        ({"shape": (2, 3), "strides": (1,)}, 24, "malformed"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, 24, "reaches beyond"),
        ({"shape": (2, 3), "strides": (3, 1)}, 20, "has 20 bytes, expected 24"),
        ({"shape": (2, 3), "strides": (3, 1), "numel": 2**50}, 24, "has 24 bytes"),
        ({"shape": (2, 3), "strides": (3, 1), "storage": "QInt8Storage"}, 24, "refused.*QInt8Storage"),
        ({"shape": (2, 3), "strides": (3, 1)}, None, "missing"),
    ],
)
def test_lying_tensors_are_refused(tmp_path, options, data, message):
    records = {} if data is None else {"0": bytes(data)}
    write_zip(tmp_path / "w.pt", tensor_pickle(**options), records)
    with pytest.raises(InputError, match=message):
        read_arrays(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
def test_truncated_at_any_length(tmp_path, name):
    data = (GOLDENS / name).read_bytes()
    for size in sorted({0, 1, 7, 40, *range(100, len(data) - 1, 331), len(data) - 1}):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(InputError, match=r"cut\.pt"):
            read_arrays(tmp_path / "cut.pt")


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
def test_any_damage_is_an_input_error(tmp_path, name):
    # Whatever the bytes say, the only error is InputError, and no memory is taken that the file does not hold.
    random, data = np.random.default_rng(0), (GOLDENS / name).read_bytes()
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 4)):
            damaged[place] = random.integers(256)
        (tmp_path / "bad.pt").write_bytes(damaged)
        try:
            read_arrays(tmp_path / "bad.pt")
        except InputError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("writer", [write_zip, write_legacy])
def test_a_huge_memo_index_takes_no_memory(tmp_path, writer):
    writer(tmp_path / "w.bin", b"\x80\x02}r\xff\xff\xff\x7f.")  # LONG_BINPUT 2**31 - 1: 32 GB of slots
    with pytest.raises(InputError, match="memo index 2147483647"):
        read_arrays(tmp_path / "w.bin")


def test_lists_that_hold_each_other_take_no_time(tmp_path):
    content: list = []
    for _ in range(30):
        content = [content] * 10
    write_zip(tmp_path / "w.pt", pickle.dumps(content, 2))
    with pytest.raises(InputError, match="entries"):
        read_arrays(tmp_path / "w.pt")


def test_flipped_byte_in_an_archive(tmp_path):
    data = bytearray((GOLDENS / "zip.pt").read_bytes())
    place = data.find(np.arange(24, dtype=np.float64).tobytes())
    data[place + 9] ^= 1
    (tmp_path / "bad.pt").write_bytes(data)
    with pytest.raises(InputError, match=r"bad\.pt"):
        read_arrays(tmp_path / "bad.pt")


def test_compressed_archive_and_foreign_zip(tmp_path):
    write_zip(tmp_path / "w.pt", tensor_pickle((1,), (1,)), {"0": bytes(24)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed"):
        read_arrays(tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(InputError, match=r"one data\.pkl"):
        read_arrays(tmp_path / "x.pt")


def test_pickle_cannot_alter_the_reader(tmp_path):
    # BUILD on an admitted global: sets attributes on what find_class returned.
    attack = b"\x80\x02ctorch._utils\n_rebuild_parameter\n(N}X\x04\x00\x00\x00kindX\x01\x00\x00\x00xstb."
    write_zip(tmp_path / "a.pt", attack)
    with pytest.raises(InputError):
        read_arrays(tmp_path / "a.pt")
    check_equal(read_torch(GOLDENS / "zip.pt"), expected_arrays())


def test_safetensors_folder_and_shards(tmp_path):
    arrays = {name: np.ascontiguousarray(a) for name, a in expected_arrays().items() if name != "complex64"}
    save_file(arrays, tmp_path / "model.safetensors")
    check_equal(read_arrays(tmp_path), arrays)
    assert find_weights(tmp_path).name == "model.safetensors"

    sharded = tmp_path / "sharded"
    sharded.mkdir()
    half = dict(list(arrays.items())[::2])
    rest = {name: a for name, a in arrays.items() if name not in half}
    save_file(half, sharded / "model-1.safetensors")
    save_file(rest, sharded / "model-2.safetensors")
    places = {name: "model-1.safetensors" if name in half else "model-2.safetensors" for name in arrays}
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    check_equal(read_arrays(sharded), arrays)
    assert hash_arrays(read_arrays(sharded)) == hash_arrays(read_arrays(tmp_path))

    index.write_text(json.dumps({"weight_map": {**places, "ghost": "model-2.safetensors"}}))
    with pytest.raises(InputError, match="ghost"):
        read_arrays(sharded)
    index.write_text(json.dumps({"weight_map": {**places, "int8": "../model.safetensors"}}))
    with pytest.raises(InputError, match="plain file name"):
        read_arrays(sharded)
    index.write_text(json.dumps({"weight_map": places}))
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-2\.safetensors is missing"):
        read_arrays(sharded)


def test_damaged_safetensors_and_nothing_there(tmp_path):
    save_file({"a": np.ones(8, np.float32)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    for bad in (data[:-3], b"", struct.pack("<Q", 2**40) + data[8:], b"version https://git-lfs"):
        (tmp_path / "b.safetensors").write_bytes(bad)
        with pytest.raises(InputError, match=r"b\.safetensors"):
            read_arrays(tmp_path / "b.safetensors")
    for missing in ("none.safetensors", "none"):
        with pytest.raises(InputError, match="no such file"):
            read_arrays(tmp_path / missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"expected one of model\.safetensors"):
        read_arrays(tmp_path / "empty")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="expected .safetensors"):
        read_arrays(tmp_path / "a.txt")


def test_hash_arrays():
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((), np.int32)}
    reference = hash_arrays(arrays)
    # Written down: features cached on one machine must be recognised on another.
    assert reference == "cbc718af0f2e30622fbc094408b3c46c9ba2de32125da541908968e10a26f4b3"
    fortran = {"b": arrays["b"], "a": np.asfortranarray(arrays["a"]).astype(">f4")}
    assert hash_arrays(fortran) == reference
    for other in (
        {**arrays, "a": arrays["a"].reshape(3, 2)},
        {**arrays, "a": arrays["a"].view(np.int32)},
        {"a": arrays["a"], "c": arrays["b"]},
        {**arrays, "a": np.nextafter(arrays["a"], 1)},
    ):
        assert hash_arrays(other) != reference
    assert hash_arrays({"x": np.ones(2, ml_dtypes.bfloat16)}) != hash_arrays({"x": np.ones(2, np.float16)})


def test_hash_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a").startswith("ba7816bf8f01cfea")
    with pytest.raises(InputError, match="cannot be read"):
        hash_file(tmp_path / "b")
