"""The store's reader: what was written comes back, and every kind of damage is told by name."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tove_jax.cli import features as command
from tove_jax.data.picture import Picture
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import codecs, statistics, store
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures
from tove_jax.experts.extract import extract
from tove_jax.experts.manifest import BASIS_FILE, FILE_NAME, Manifest, Moments
from tove_jax.experts.media import SUFFIXES, stride
from tove_jax.experts.shards import ShardWriter
from tove_jax.experts.store import FeatureStore, verify_store

COUNT = 23


class Toys:
    """Small random pictures with ids that are not plain ASCII."""

    name, licence = "toys", "CC0-1.0"
    ids = tuple(f"bär/{i}" for i in range(COUNT))

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(0, 256, (9, 9, 3), np.uint8)
        return Picture(self.ids[index], image)


def _apply(params, pixels):
    values = pixels.reshape(len(pixels), 2, 4, 2, 12).swapaxes(2, 3).reshape(len(pixels), 4, 4, 12) / 255.0 - 0.5
    return ExpertFeatures(patches=values, summary=values.mean((1, 2)))


VIEW = View(size=8)
CARD = ExpertCard("toy", "Toy", "none", "none", "CC0-1.0", VIEW, (4, 4), 12, summary_width=12, backend="host")
EXPERT = Expert(CARD, {}, "hash of the toy", _apply)


def _features(index: int) -> ExpertFeatures:
    return _apply({}, VIEW.cut(Toys()[index].image)[None])


OPTIONS = {"shard_records": 5, "batch": 3, "progress": False}
STORES = [
    *((codec, "mmap") for codec in (*codecs.QUANTIZERS, "pool:2+pca:5+int8", "pool:3x2+int4:4")),
    ("int4", "arrayrecord"),
]


@pytest.fixture(scope="module", params=STORES, ids=" ".join)
def folder(request, tmp_path_factory):
    codec, medium = request.param
    folder = tmp_path_factory.mktemp("store") / "toy"
    extract(EXPERT, Toys(), range(COUNT), folder, codec=codec, medium=medium, **OPTIONS)
    return folder


@pytest.fixture(scope="module", params=SUFFIXES)
def sound(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"sound-{request.param}") / "toy"
    extract(EXPERT, Toys(), range(COUNT), folder, medium=request.param, **OPTIONS)
    return folder


@pytest.fixture
def damaged(sound, tmp_path):
    """A copy of a sound store for the test to damage, its path holding the name `toy`."""
    return shutil.copytree(sound, tmp_path / "toy")


def test_what_was_written_comes_back(folder):
    reader = FeatureStore.open(folder)
    assert reader.ids == Toys.ids and len(reader) == COUNT
    assert "bär/3" in reader and "bear" not in reader
    for index in np.random.default_rng(0).permutation(COUNT):
        id = Toys.ids[index]
        payload = reader.read(id)
        (wanted,) = codecs.encode_features(reader.manifest.codec, _features(index), [id], "toy", reader.manifest.basis)
        assert list(payload) == list(reader.manifest.arrays)
        for name, value in wanted.items():
            assert payload[name].dtype == value.dtype and payload[name].tobytes() == value.tobytes()
            assert payload[name].shape == value.shape


def test_decoded_features_inside_jit(folder):
    import jax

    reader = FeatureStore.open(folder)
    ids = reader.ids[4:9]
    found = jax.jit(lambda payload: store.decode_features(reader.manifest, payload))(reader.read_batch(ids))
    assert found.cls_attention is None
    for row, index in enumerate(range(4, 9)):
        wanted, codec = _features(index), codecs.parse(reader.manifest.codec)
        if codec.pca is None:
            np.testing.assert_allclose(found.patches[row], codec.pooled(wanted.patches)[0], atol=0.05)
        np.testing.assert_allclose(found.summary[row], wanted.summary[0], rtol=1e-6)


def test_threads_and_more_shards_than_stay_open(sound, monkeypatch):
    monkeypatch.setattr(store, "_OPEN_SHARDS", 2)
    reader = FeatureStore.open(sound)
    order = np.random.default_rng(0).integers(0, COUNT, 400)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: reader.read(reader.ids[i])["summary"], order))
    for index, summary in zip(order, found, strict=True):
        np.testing.assert_allclose(summary, _features(index).summary[0], rtol=1e-6)
    assert len(reader._readers) <= 2


def test_pickles_small_and_opens_anew(sound):
    reader = FeatureStore.open(sound, verify=False)
    reader.read(reader.ids[0])
    text = pickle.dumps(reader)
    assert len(text) < 400
    again = pickle.loads(text)
    assert again.ids == reader.ids and not again.verify
    np.testing.assert_array_equal(again.read("bär/7")["summary"], reader.read("bär/7")["summary"])


def test_unknown_record(sound):
    with pytest.raises(InputError, match="no features of record 'bear'"):
        FeatureStore.open(sound).read("bear")


def _shard(folder, number):
    return folder / Manifest.read(folder).shards[number].file


def test_missing_shard(damaged):
    _shard(damaged, 2).unlink()
    with pytest.raises(InputError, match=r"toy/shard-00002-of-00005\.\w+: missing"):
        FeatureStore.open(damaged)
    assert verify_store(damaged)[0] == COUNT - 5


def test_missing_index(damaged):
    _shard(damaged, 2).with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"toy/shard-00002-of-00005.json: missing"):
        FeatureStore.open(damaged)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"format": 1, "ids": 3}'])
def test_index_that_is_none(damaged, text):
    _shard(damaged, 1).with_suffix(".json").write_text(text)
    with pytest.raises(InputError, match=r"shard-00001-of-00005.json: not a shard's index"):
        FeatureStore.open(damaged)


@pytest.mark.parametrize("keep", [0, 1, 0.5])
def test_truncated_shard(damaged, keep):
    path = _shard(damaged, 4)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep < 1 else -1])
    with pytest.raises(InputError, match=rf"shard-00004-of-00005\.\w+: expected {len(content)} bytes"):
        FeatureStore.open(damaged)


def _flip_byte(folder, id, offset=3):
    """Flips a bit in the middle of a record's payload; returns the shard's name."""
    reader = FeatureStore.open(folder)
    number, _ = reader._places[id]
    path = _shard(folder, number)
    content = bytearray(path.read_bytes())
    at = content.index(reader.read(id)["patches"].tobytes())
    content[at + offset] ^= 1
    path.write_bytes(content)
    return path.name


def test_the_padding_of_the_test_is_there(sound):
    assert stride(Manifest.read(sound).record_bytes) > Manifest.read(sound).record_bytes


def test_flipped_byte_names_record_and_shard(damaged):
    name = _flip_byte(damaged, "bär/12")
    reader = FeatureStore.open(damaged)
    with pytest.raises(InputError, match=rf"{name}: record 'bär/12': damaged"):
        reader.read("bär/12")
    for id in reader.ids:
        if id != "bär/12":
            reader.read(id)


class _Corrupting:
    """A reader whose records differ from the file's, as after a fault that ArrayRecord does not see."""

    def __init__(self, reader, change):
        self.reader, self.change = reader, change

    def read(self, position):
        return self.change(bytes(self.reader.read(position)))


@pytest.mark.parametrize(
    ("change", "message", "without_crc"),
    [
        (lambda r: bytes([r[0] ^ 1]) + r[1:], "damaged: CRC-32", None),
        (lambda r: r[:-1], "expected .* bytes, found", "expected .* bytes"),
        (lambda r: r[:-5] + bytes([r[-5] ^ 1]) + r[-4:], "(damaged: CRC-32|another record)", "another record"),
    ],
)
def test_own_checks(sound, change, message, without_crc):
    if Manifest.read(sound).medium == "mmap":  # such a record is its payload alone, and its CRC says all
        without_crc = None
    for verify, expected in ((True, message), (False, without_crc)):
        reader = FeatureStore.open(sound, verify=verify)
        reader._readers[0] = _Corrupting(reader._reader(0), change)
        if expected is None:
            with contextlib.suppress(ValueError):
                reader.read("bär/1")
            continue
        with pytest.raises(InputError, match=rf"shard-00000-of-00005\.\w+: record 'bär/1': {expected}"):
            reader.read("bär/1")


def test_shard_of_another_expert(damaged, tmp_path):
    other = tmp_path / "other"
    foreign = Expert(CARD, {}, "other weights", _apply)
    extract(foreign, Toys(), range(COUNT), other, medium=Manifest.read(damaged).medium, **OPTIONS)
    for suffix in (".json", _shard(other, 1).suffix):
        shutil.copy(_shard(other, 1).with_suffix(suffix), _shard(damaged, 1).with_suffix(suffix))
    with pytest.raises(InputError, match="shard-00001-of-00005.json: another store's shard"):
        FeatureStore.open(damaged)


def test_swapped_shards(damaged):
    """Same expert, right size, wrong pictures: the index names its file."""
    for suffix in (".json", _shard(damaged, 0).suffix):
        first, second = (_shard(damaged, n).with_suffix(suffix) for n in (0, 1))
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    with pytest.raises(InputError, match="another store's shard: file"):
        FeatureStore.open(damaged)


def test_unfinished_store(damaged):
    manifest = json.loads((damaged / FILE_NAME).read_text())
    (damaged / FILE_NAME).write_text(json.dumps({**manifest, "complete": False}))
    _shard(damaged, 0).with_suffix(".json").unlink()
    with pytest.raises(InputError, match="not finished, 4 of 5 shards"):
        FeatureStore.open(damaged)


def _features_command(action, *paths):
    return command.run(types.SimpleNamespace(action=action, path=paths, records=4, codecs=None, workdir=None))


def test_verify_reports_every_fault_by_id(damaged, capsys):
    for id in ("bär/2", "bär/3", "bär/17"):
        _flip_byte(damaged, id)
    sound_records, problems = verify_store(damaged)
    assert sound_records == COUNT - 3
    assert len(problems) == 3
    for id, problem in zip(("bär/2", "bär/3", "bär/17"), problems, strict=True):
        assert repr(id) in problem
    assert _features_command("verify", damaged.parent) == 1
    assert "'bär/17'" in capsys.readouterr().out


def test_a_store_of_the_first_format_opens_and_is_continued(damaged):
    """Such stores have ArrayRecord files, and manifests without the fields that came later."""
    if Manifest.read(damaged).medium != "arrayrecord":
        pytest.skip("the first format had one medium")
    wanted = FeatureStore.open(damaged).features(Toys.ids).patches
    fields = json.loads((damaged / FILE_NAME).read_text())
    later = ("medium", "dtype", "basis_hash", "phi_s_hash")
    fields = {name: value for name, value in fields.items() if name not in later}
    (damaged / FILE_NAME).write_text(json.dumps({**fields, "format": 1}))
    for path in damaged.glob("shard-*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    np.testing.assert_array_equal(FeatureStore.open(damaged).features(Toys.ids).patches, wanted)
    _shard(damaged, 1).unlink()
    manifest = extract(EXPERT, Toys(), range(COUNT), damaged, medium="mmap", **OPTIONS)
    assert manifest.complete and (manifest.format, manifest.medium) == (1, "arrayrecord")
    np.testing.assert_array_equal(FeatureStore.open(damaged).features(Toys.ids).patches, wanted)


def test_axes_that_are_another_stores(tmp_path):
    extract(EXPERT, Toys(), range(COUNT), tmp_path / "toy", codec="pca:4+int8", **OPTIONS)
    file = tmp_path / "toy" / BASIS_FILE
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{BASIS_FILE}: expected sha256"):
        FeatureStore.open(tmp_path / "toy")
    file.unlink()
    with pytest.raises(InputError, match=f"{BASIS_FILE}: cannot be read"):
        FeatureStore.open(tmp_path / "toy")


def test_verify_sees_bytes_outside_records(damaged):
    path = _shard(damaged, 0)
    content = bytearray(path.read_bytes())
    filling = Manifest.read(damaged).record_bytes  # of a mapped record
    content[content.index(b"group_size") if path.suffix == ".arrayrecord" else filling] ^= 1
    path.write_bytes(content)
    _, problems = verify_store(damaged)
    assert problems and "shard-00000" in problems[0]


def test_ls_and_stats(folder, capsys):
    for action in ("ls", "verify", "stats"):
        assert _features_command(action, folder) == 0
    text = capsys.readouterr().out
    manifest = Manifest.read(folder)
    grid = "x".join(map(str, manifest.shapes["patches"]))
    for part in ("5/5 shards", manifest.codec, f"patches {grid}", "23 sound records, 0 faults", "token norm"):
        assert part in text
    assert ("(stored so)" in text) == (manifest.codec in statistics.CODECS)
    with pytest.raises(InputError, match="expected feature stores"):
        _features_command("ls", folder / "nothing")


def test_writer_refuses_another_shape_and_leaves_nothing(sound, tmp_path):
    manifest = Manifest.read(sound)
    good = {name: np.zeros(spec.shape, codecs.dtype_of(spec.dtype)) for name, spec in manifest.arrays.items()}
    bad = [
        {**good, "patches": good["patches"][:3]},
        {**good, "patches": good["patches"].astype(np.float32)},
        {"patches": good["patches"]},
        {**good, "more": good["summary"]},
    ]
    for payload in bad:
        with pytest.raises(InputError, match="record 'x', expert 'toy'"), ShardWriter(tmp_path, manifest, 0) as writer:
            writer.write("y", good)
            writer.write("x", payload)
    with pytest.raises(InputError, match="expected 5 records, found 1"), ShardWriter(tmp_path, manifest, 0) as writer:
        writer.write("y", good)
        writer.finish(Moments())
    assert list(tmp_path.iterdir()) == []
