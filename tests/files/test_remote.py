"""Copies of what object stores hold, on fsspec's file system in memory."""

import fsspec
import pytest

from tove_jax.errors import InputError
from tove_jax.files import remote


@pytest.fixture
def bucket():
    """A bucket in memory; ``bucket(name, content)`` puts a file there."""
    system = fsspec.filesystem("memory")

    def put(name, content):
        with system.open(f"/bucket/{name}", "wb") as stream:
            stream.write(content)

    remote.local.cache_clear()
    yield put
    system.rm("/bucket", recursive=True)
    remote.local.cache_clear()


def fresh(path, cache):
    """As another process would."""
    remote.local.cache_clear()
    return remote.local(path, cache)


def test_local_paths_stay_as_they_are(tmp_path):
    assert remote.local(str(tmp_path / "x"), tmp_path) == tmp_path / "x"
    assert remote.parent("gs://bucket/a/b.json") == "gs://bucket/a" and remote.parent("a/b.json") == "a"


def test_a_file_and_a_folder(bucket, tmp_path):
    bucket("data/talk.json", b"[]")
    bucket("data/pictures/a.png", b"abc")
    path = fresh("memory://bucket/data/talk.json", tmp_path)
    assert path.name == "talk.json" and path.read_bytes() == b"[]"
    folder = fresh("memory://bucket/data", tmp_path)
    assert (folder / "pictures/a.png").read_bytes() == b"abc" and (folder / "talk.json").read_bytes() == b"[]"
    assert not list(tmp_path.rglob("*.partial"))


def test_only_what_changed_is_copied_again(bucket, tmp_path, monkeypatch):
    bucket("data/a", b"one")
    bucket("data/b", b"two")
    copied = []
    copy = remote._copy
    monkeypatch.setattr(remote, "_copy", lambda *args: (copied.append(args[2]), copy(*args)))
    fresh("memory://bucket/data", tmp_path)
    fresh("memory://bucket/data/", tmp_path)
    assert sorted(copied) == ["a", "b"]
    bucket("data/b", b"new")
    assert (fresh("memory://bucket/data", tmp_path) / "b").read_bytes() == b"new"
    assert sorted(copied) == ["a", "b", "b"]


def test_a_copy_that_is_cut_short_is_none(bucket, tmp_path, monkeypatch):
    bucket("data/a", b"whole")
    system = type(fsspec.filesystem("memory"))
    found = system.find

    def longer(*args, **options):
        return {name: {**about, "size": about["size"] + 1} for name, about in found(*args, **options).items()}

    monkeypatch.setattr(system, "find", longer)
    with pytest.raises(InputError, match="/bucket/data/a: expected 6 bytes, found 5"):
        fresh("memory://bucket/data", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_cannot_be_read_says_so(bucket, tmp_path, monkeypatch):
    bucket("data/a", b"")
    with pytest.raises(InputError, match="memory://bucket/none: nothing there"):
        fresh("memory://bucket/none", tmp_path)
    with pytest.raises(InputError, match="nowhere://bucket: cannot be opened: .*Protocol not known"):
        fresh("nowhere://bucket", tmp_path)
    monkeypatch.setattr(
        fsspec.core, "url_to_fs", lambda path, **more: (_ for _ in ()).throw(ImportError("Please install s3fs"))
    )
    with pytest.raises(
        InputError, match="s3://bucket: s3fs has to be installed; install tove_jax with the extra `cloud`"
    ):
        fresh("s3://bucket", tmp_path)
