"""Extraction: killed anywhere and started again, shared by processes, refused where things would mix.

Run as a script this file starts the processes that the tests kill; it imports no JAX.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tove_jax.cli.extract import share
from tove_jax.config.schema import Config, DataConfig, FeaturesConfig, StudentConfig
from tove_jax.data.picture import Picture
from tove_jax.data.split import split
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import shards
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures
from tove_jax.experts.extract import extract
from tove_jax.experts.manifest import FILE_NAME, Manifest
from tove_jax.experts.run import chosen_experts, extract_all
from tove_jax.experts.store import FeatureStore, verify_store

ROOT = Path(__file__).resolve().parents[2]
COUNT = 41
OPTIONS = {"shard_records": 6, "batch": 4, "prefetch": 1, "progress": False}
OLD = {"medium": "arrayrecord"}
AXES = {"codec": "pca:5+int8"}


class Toys:
    """Random pictures; `delay` seconds each."""

    name, licence = "toys", "CC0-1.0"

    def __init__(self, count=COUNT, delay=0.0):
        self.ids = tuple(f"toy {i}" for i in range(count))
        self.delay = delay
        self.reads = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self.reads += 1
        time.sleep(self.delay)
        return Picture(self.ids[index], np.random.default_rng(index).integers(0, 256, (9, 12, 3), np.uint8))


def _patches(pixels):
    # By a power of two, so that every way to compute it gives the same numbers.
    values = (pixels.astype("float32") / 256.0 - 0.5).reshape(len(pixels), 2, 4, 2, 12)
    return values.swapaxes(2, 3).reshape(len(pixels), 2, 2, 48)


def _on_host(params, pixels):
    patches = _patches(pixels)
    return ExpertFeatures(patches=patches, summary=patches.mean((1, 2)))


CARD = ExpertCard("toy", "Toy", "none", "none", "CC0-1.0", View(size=8), (2, 2), 48, summary_width=48, backend="host")
HOST = Expert(CARD, {}, "h" * 64, _on_host)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _names(manifest: Manifest) -> set[str]:
    shards = [Path(shard.file) for shard in manifest.shards]
    return {FILE_NAME, *(shard.name for shard in shards), *(shard.with_suffix(".json").name for shard in shards)}


def _made(tmp_path_factory, options):
    folder = tmp_path_factory.mktemp("unbroken") / "toy"
    extract(HOST, Toys(), range(COUNT), folder, **OPTIONS, **options)
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return _made(tmp_path_factory, {})


@pytest.fixture(scope="module")
def unbroken_old(tmp_path_factory):
    return _made(tmp_path_factory, OLD)


@pytest.fixture(scope="module")
def unbroken_axes(tmp_path_factory):
    return _made(tmp_path_factory, AXES)


class Nursery:
    """A process without JAX that forks workers: they begin within milliseconds and may be killed."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def _ask(self, **request) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, folder: Path, **options) -> int:
        """Returns the id of a process that extracts."""
        return self._ask(folder=str(folder), **options)

    def wait(self, worker: int) -> int:
        """Returns how a process ended."""
        return self._ask(wait=worker)


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.process.communicate(timeout=60)


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        status = 1
        try:
            _worker(**request)
            status = 0
        finally:
            os._exit(status)


def _worker(folder: str, kill_at: int = 0, delay: float = 0.0, **options) -> None:
    """Extracts; dies by SIGKILL just before the `kill_at`-th thing it asks of the file system."""
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    if kill_at:
        for name in ("open", "close", "replace", "fsync", "unlink", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        shards.ShardWriter.write = counted(shards.ShardWriter.write)
    extract(HOST, Toys(delay=delay), range(COUNT), folder, **OPTIONS, **options)


def test_an_unbroken_run(unbroken):
    manifest = Manifest.read(unbroken)
    assert manifest.complete and len(manifest.shards) == 7
    assert set(_content(unbroken)) == _names(manifest)
    reader = FeatureStore.open(unbroken)
    assert reader.ids == Toys().ids
    found = reader.features(reader.ids)
    wanted = _on_host({}, np.stack([CARD.view.cut(Toys()[i].image) for i in range(COUNT)]))
    np.testing.assert_allclose(found.patches, wanted.patches, rtol=2**-8)
    np.testing.assert_array_equal(found.summary, wanted.summary)
    assert manifest.statistics.std == pytest.approx(wanted.patches.std(), rel=1e-5)


def test_again_reads_no_picture(unbroken):
    before = _content(unbroken)
    source = Toys()
    assert extract(HOST, source, range(COUNT), unbroken, **OPTIONS).complete
    assert source.reads == 0 and _content(unbroken) == before


def test_killed_at_any_moment_and_started_again(nursery, unbroken_old, tmp_path):
    """Processes die one after the other, each some steps on; whenever one finishes, its store is compared."""
    steps = [1, 4, 9, 14, 20, 27, 33, 40, 46]
    folder, finished, remains = tmp_path / "0", 0, set()
    for step in [*steps, 0]:
        status = nursery.wait(nursery.start(folder, kill_at=step, **OLD))
        remains |= {path.suffix for path in folder.iterdir()} if folder.exists() else set()
        if status == 0:
            assert _content(folder) == _content(unbroken_old)
            finished += 1
            folder = tmp_path / str(finished)
        else:
            assert status == -signal.SIGKILL, step
    assert finished >= 1
    assert remains >= {".lock", ".partial", ".tmp"}, "the kills were meant to leave these behind"


def test_twenty_random_kills_among_changing_numbers_of_processes(nursery, unbroken_axes, tmp_path):
    """The axes of the codec are fitted under kills too; whenever a store is finished it is compared."""
    rng, kills, finished = random.Random(1), 0, 0
    while kills < 20:
        folder = tmp_path / str(finished)
        workers = [nursery.start(folder, delay=0.004, **AXES) for _ in range(rng.choice((1, 2, 3, 4)))]
        for worker in workers:
            time.sleep(rng.uniform(0.0, 0.1))
            os.kill(worker, signal.SIGKILL)
        found = [nursery.wait(worker) for worker in workers]
        assert set(found) <= {0, -signal.SIGKILL}
        kills += found.count(-signal.SIGKILL)
        if (folder / FILE_NAME).exists() and Manifest.read(folder).complete:
            extract(HOST, Toys(), range(COUNT), folder, **OPTIONS, **AXES)
            assert _content(folder) == _content(unbroken_axes)
            finished += 1
    extract(HOST, Toys(), range(COUNT), tmp_path / str(finished), **OPTIONS, **AXES)
    assert _content(tmp_path / str(finished)) == _content(unbroken_axes)


def test_two_processes_share_the_work(nursery, unbroken, tmp_path):
    folder = tmp_path / "toy"
    workers = [nursery.start(folder, delay=0.1) for _ in range(2)]
    source = Toys(delay=0.1)
    manifest = extract(HOST, source, range(COUNT), folder, **OPTIONS)
    assert [nursery.wait(worker) for worker in workers] == [0, 0]
    assert manifest.complete and 0 < source.reads < COUNT
    assert _content(folder) == _content(unbroken)


def test_shares_of_hosts_without_a_common_disk(tmp_path):
    for host in range(2):
        manifest = extract(HOST, Toys(), range(COUNT), tmp_path / str(host), share=(host, 2), **OPTIONS)
        assert not manifest.complete
        done = [n for n in range(7) if shards.is_done(tmp_path / str(host), manifest, n)]
        assert done == list(range(host, 7, 2))
    source = Toys()
    assert extract(HOST, source, range(COUNT), tmp_path / "0", **OPTIONS).complete
    assert source.reads == 18
    with pytest.raises(InputError, match="found 2/2"):
        extract(HOST, Toys(), range(COUNT), tmp_path / "2", share=(2, 2), **OPTIONS)


def test_share_of_the_command():
    assert share("1/4") == (1, 4)
    for text in ("", "1", "4/4", "-1/4", "a/b"):
        with pytest.raises(ValueError):
            share(text)


def test_a_shard_is_written_by_one_alone(tmp_path):
    """Threads stand in for processes: a lock belongs to an open file, not to a process."""
    folder, sources = tmp_path / "toy", [Toys(delay=0.002) for _ in range(4)]
    threads = [
        threading.Thread(target=extract, args=(HOST, source, range(COUNT), folder), kwargs=OPTIONS)
        for source in sources
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(source.reads for source in sources) == COUNT
    assert verify_store(folder) == (COUNT, [])
    assert set(_content(folder)) == _names(Manifest.read(folder))


def test_without_waiting_leaves_claimed_shards_to_others(tmp_path):
    folder = tmp_path / "toy"
    extract(HOST, Toys(), range(COUNT), folder, **OPTIONS)
    manifest = Manifest.read(folder)
    (folder / manifest.shards[3].file).unlink()
    with shards.claim(folder / "shard-00003-of-00007.lock") as claimed:
        assert claimed
        assert not extract(HOST, Toys(), range(COUNT), folder, wait=False, **OPTIONS).complete
        with pytest.raises(InputError, match="not finished"):
            FeatureStore.open(folder)
    source = Toys()
    assert extract(HOST, source, range(COUNT), folder, **OPTIONS) == manifest
    assert source.reads == 6


def test_damaged_shards_are_written_anew(unbroken, tmp_path):
    folder = tmp_path / "toy"
    extract(HOST, Toys(), range(COUNT), folder, **OPTIONS)
    (folder / "shard-00001-of-00007.records").write_bytes(b"short")
    (folder / "shard-00005-of-00007.json").write_text("{")
    source = Toys()
    extract(HOST, source, range(COUNT), folder, **OPTIONS)
    assert source.reads == 12
    assert _content(folder) == _content(unbroken)


def test_some_pictures_in_a_given_order(tmp_path):
    extract(HOST, Toys(), np.array([7, 3, 30]), tmp_path / "toy", **OPTIONS)
    assert FeatureStore.open(tmp_path / "toy").ids == ("toy 7", "toy 3", "toy 30")


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_jax_expert_equals_the_host_one(codec, tmp_path):
    import jax.numpy as jnp

    scale = jnp.full((48,), 2.0)
    calls = []

    def apply(params, pixels):
        calls.append(pixels.shape)
        patches = _patches(pixels) * params["scale"]
        return ExpertFeatures(patches=patches, summary=patches.mean((1, 2)))

    card = dataclasses.replace(CARD, backend="jax")
    extract(Expert(card, {"scale": scale}, "j", apply), Toys(), range(11), tmp_path / "jax", codec=codec, **OPTIONS)
    assert calls == [(4, 8, 8, 3)], "padded batches compile once"
    extract(HOST, Toys(), range(11), tmp_path / "host", codec=codec, **OPTIONS)
    found, wanted = FeatureStore.open(tmp_path / "jax"), FeatureStore.open(tmp_path / "host")
    np.testing.assert_allclose(
        found.features(found.ids).patches, 2 * wanted.features(wanted.ids).patches, rtol=1e-5, atol=1e-6
    )


# What must not be mixed.


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"expert": dataclasses.replace(HOST, weights_hash="g" * 64)}, ["h" * 64, "g" * 64]),
        ({"view": CARD.view.flipped()}, [CARD.view.key(), CARD.view.flipped().key(), "flip is False"]),
        ({"codec": "int8"}, ["bf16", "int8"]),
        ({"expert": dataclasses.replace(HOST, card=dataclasses.replace(CARD, grid=(1, 4)))}, ["(2, 2", "(1, 4"]),
        ({"indices": range(40)}, ["41 pictures", "40 pictures"]),
    ],
)
def test_refuses_to_continue_something_else(unbroken, change, parts):
    before = _content(unbroken)
    given = {"expert": HOST, "indices": range(COUNT), **change}
    with pytest.raises(InputError) as caught:
        extract(given.pop("expert"), Toys(), given.pop("indices"), unbroken, **given, **OPTIONS)
    assert all(part in str(caught.value) for part in [str(unbroken), *parts])
    assert _content(unbroken) == before


def test_refuses_a_view_that_is_not_the_experts(tmp_path):
    with pytest.raises(InputError, match="its view .* or the mirror"):
        extract(HOST, Toys(), range(4), tmp_path / "toy", view=View(size=8, fit="pad"), **OPTIONS)
    assert not (tmp_path / "toy").exists()


def test_an_existing_store_keeps_its_shard_size(unbroken):
    assert extract(HOST, Toys(), range(COUNT), unbroken, **{**OPTIONS, "shard_records": 20}).shard_records == 6


# What goes wrong from outside.


def _nothing_half_written(folder: Path) -> None:
    allowed = _names(Manifest.read(folder))
    names = set(_content(folder))
    assert names <= allowed
    assert {name for name in names if name.endswith(".records")} == {
        name.replace(".json", ".records") for name in names - {FILE_NAME} if name.endswith(".json")
    }


@pytest.mark.parametrize("options", [OLD, {"medium": "mmap", "shard_records": COUNT}], ids=str)
def test_disk_full_while_a_shard_is_written(tmp_path, options):
    """A limit on file size makes the system refuse writes as a full disk does."""
    folder, limits = tmp_path / "toy", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"shard-00000-of-0000\d.\w+: cannot be written: .*too large"):
            extract(HOST, Toys(), range(COUNT), folder, **{**OPTIONS, **options})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(_content(folder)) == {FILE_NAME}
    assert extract(HOST, Toys(), range(COUNT), folder, **{**OPTIONS, **options}).complete


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
def test_disk_full_at_any_sync(unbroken, tmp_path, monkeypatch, at):
    folder, real, count = tmp_path / "toy", os.fsync, 0

    def full(handle):
        nonlocal count
        count += 1
        if count == at:
            raise OSError(28, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        extract(HOST, Toys(), range(COUNT), folder, **OPTIONS)
    monkeypatch.undo()
    left = {path.suffix for path in folder.iterdir()}
    assert left <= {".json", ".records"}, left
    extract(HOST, Toys(), range(COUNT), folder, **OPTIONS)
    assert _content(folder) == _content(unbroken)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/toy.*cannot be written"):
        extract(HOST, Toys(), range(COUNT), tmp_path / "file" / "toy", **OPTIONS)
    assert (tmp_path / "file").read_text() == ""


def test_folder_without_the_right_to_write(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="toy.*cannot be written: Permission denied"):
        extract(HOST, Toys(), range(COUNT), tmp_path / "toy", **OPTIONS)
    assert list((tmp_path / "toy").iterdir()) == []


class _Broken(Toys):
    def __getitem__(self, index):
        if index == 9:
            raise InputError("9.png: truncated")
        return super().__getitem__(index)


class _Gone(Toys):
    def __getitem__(self, index):
        return open("/nowhere/0.png")


class _Shuffled(Toys):
    def __getitem__(self, index):
        return super().__getitem__(COUNT - 1 - index)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (_Broken(), "source 'toys', record 'toy 9': 9.png: truncated"),
        (_Gone(), "source 'toys', record 'toy 0': .*No such file.*'/nowhere/0.png'"),
        (_Shuffled(), "record 'toy 0': the source gives record 'toy 40' in its place"),
    ],
)
def test_a_picture_that_cannot_be_read(tmp_path, source, message):
    with pytest.raises(InputError, match=message):
        extract(HOST, source, range(COUNT), tmp_path / "toy", **OPTIONS)
    _nothing_half_written(tmp_path / "toy")


def _without_summary(params, pixels):
    return ExpertFeatures(patches=_patches(pixels))


def _wide(params, pixels):
    return ExpertFeatures(np.ones((len(pixels), 2, 2, 49), np.float32), np.ones((len(pixels), 48), np.float32))


def _not_finite(params, pixels):
    features = _on_host(params, pixels)
    features.patches[2, 0, 1, 5] = np.nan
    return features


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (_without_summary, "expert 'toy': its card promises .*summary"),
        (_wide, r"expert 'toy': its card promises .*\(4, 2, 2, 48\).*found .*\(4, 2, 2, 49\)"),
        (_not_finite, r"record 'toy 2', expert 'toy', patches: expected finite values, found nan at \(0, 1, 5\)"),
    ],
)
def test_features_that_are_not_what_the_card_says(tmp_path, apply, message):
    with pytest.raises(InputError, match=message):
        extract(dataclasses.replace(HOST, apply=apply), Toys(), range(COUNT), tmp_path / "toy", **OPTIONS)
    assert set(_content(tmp_path / "toy")) == {FILE_NAME}


@pytest.mark.parametrize("setting", ["batch", "threads", "prefetch"])
def test_settings_below_one(tmp_path, setting):
    with pytest.raises(InputError, match=setting):
        extract(HOST, Toys(), range(4), tmp_path, **{**OPTIONS, setting: -1})


# All experts of a config.


def _config(**features) -> Config:
    return Config(
        student=StudentConfig(initialize="a CLIP folder"),
        data=DataConfig(flip=True, held_out=0.3),
        features=FeaturesConfig(**{"experts": ("clip", "toy:8"), "shard_records": 6, "batch": 4, **features}),
    )


def test_every_expert_plain_and_mirrored(tmp_path):
    asked = []

    def load(spec, **options):
        asked.append((spec, options))
        return dataclasses.replace(HOST, card=dataclasses.replace(CARD, name=spec.partition(":")[0]))

    stores = extract_all(_config(), tmp_path, source=Toys(), load=load, progress=False)
    assert asked == [("clip", {"weights": "a CLIP folder", "feature": "layers/-2"}), ("toy:8", {})]
    assert stores == {
        name: [tmp_path / "features" / name, tmp_path / "features" / f"{name}@flip"] for name in ("clip", "toy")
    }
    plain, flipped = (FeatureStore.open(path) for path in stores["toy"])
    sides = split(Toys().ids, 0.3)
    assert plain.ids == Toys().ids
    assert flipped.ids == tuple(Toys().ids[i] for i in sides.train) and len(sides.held_out)
    assert flipped.manifest.view["flip"] and not plain.manifest.view["flip"]
    id = flipped.ids[0]
    image = Toys()[Toys().ids.index(id)].image
    wanted = _patches(CARD.view.cut(image[:, ::-1])[None])
    np.testing.assert_allclose(flipped.features([id]).patches, wanted, rtol=2**-8)
    assert [path.name for path in tmp_path.iterdir()] == ["features"]
    only = extract_all(_config(), tmp_path, experts=["toy"], source=Toys(), load=load, progress=False)
    assert list(only) == ["toy"]


def test_experts_by_name():
    assert chosen_experts(_config()) == {"clip": "clip", "toy": "toy:8"}
    assert chosen_experts(_config(), ["toy:8"]) == {"toy": "toy:8"}
    with pytest.raises(InputError, match="found 'tyo'.*did you mean 'toy'"):
        chosen_experts(_config(), ["tyo"])
    with pytest.raises(InputError, match="'toy' is given twice, as 'toy:8' and 'toy:16'"):
        chosen_experts(_config(experts=("toy:8", "toy:16")))


def test_unknown_expert_is_told_before_any_runs(tmp_path):
    config = _config(experts=("hed", "efficientnet_lite"))
    with pytest.raises(InputError, match="efficientnet_lite.*did you mean 'efficientnet_lite0'"):
        extract_all(config, tmp_path / "run", source=Toys(), progress=False)
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    _serve()
