"""A run's small files between a local folder and fsspec's file system in memory, and what is refused."""

import sys

import fsspec
import pytest

from tove_jax.errors import InputError
from tove_jax.files import mirror
from tove_jax.files.bucket import Bucket

URL = "memory://bucket/runs/one"


@pytest.fixture(autouse=True)
def store():
    mirror.reading.cache_clear()
    yield
    system = fsspec.filesystem("memory")
    if system.exists("/bucket"):
        system.rm("/bucket", recursive=True)
    mirror.reading.cache_clear()


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_changes_goes_back_and_comes_again(tmp_path):
    with mirror.opened(URL, tmp_path) as folder:
        assert folder.name == "one" and mirror.bucket_of(folder).url == URL
        write(folder, metrics="1", start__config="a", start__weights="b", eval__x="c")
        write(folder, **{".x.tmp": "no", "start.lock": "no", "start__.x.123.tmp": "no"})
    assert mirror.bucket_of(folder) is None
    assert set(Bucket(URL).sizes()) == {".files.json", "metrics", "start/config", "start/weights", "eval/x"}
    with mirror.opened(URL, tmp_path) as folder:
        assert (folder / "start/weights").read_text() == "b"
        (folder / "eval/x").unlink()
        write(folder, metrics="2")
    assert "eval/x" not in Bucket(URL).sizes() and Bucket(URL).read("metrics") == b"2"
    with mirror.opened(URL, tmp_path, send=False) as folder:
        assert not (folder / "eval/x").exists()
        write(folder, metrics="3")
    assert Bucket(URL).read("metrics") == b"2"
    with mirror.opened(tmp_path / "local", tmp_path) as folder:
        assert folder == tmp_path / "local"


@pytest.mark.parametrize("last", ["start/weights", mirror.LISTING])
def test_killed_between_files_a_folder_is_whole_or_not_there(tmp_path, monkeypatch, last):
    """A folder that replaces another is neither the one nor the other; files that stand alone are old or new."""
    with mirror.opened(URL, tmp_path) as folder:
        write(folder, metrics="1", start__config="a", start__weights="b")
    send, wrote = Bucket.write, []

    def dying(self, name, data):
        wrote.append(name)
        # The listing is written twice: without the folder, then with it. Files go side by side, in any order.
        if name == last and (last != mirror.LISTING or wrote.count(last) == 2):
            raise KeyboardInterrupt
        send(self, name, data)

    monkeypatch.setattr(Bucket, "write", dying)
    with pytest.raises(KeyboardInterrupt), mirror.opened(URL, tmp_path) as folder:
        write(folder, metrics="22", start__config="aa", start__weights="bb")
    monkeypatch.setattr(Bucket, "write", send)
    with mirror.opened(URL, tmp_path) as folder:
        assert not (folder / "start").exists()
        assert (folder / "metrics").read_text() in ("1", "22")
        with pytest.raises(InputError, match="memory://bucket/runs/one/start: is not whole there"):
            mirror.reading(f"{URL}/start", tmp_path)
        write(folder, start__config="aa", start__weights="bb")
    assert (mirror.reading(f"{URL}/start", tmp_path) / "weights").read_text() == "bb"


def test_other_folders_are_copied_whole_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Bucket("memory://bucket/clip").write("config.json", b"{}")
    assert (mirror.reading("memory://bucket/clip") / "config.json").read_text() == "{}"
    assert mirror.located("openai/clip") == "openai/clip" and mirror.located("runs/x") == "runs/x"
    with pytest.raises(InputError, match="memory://bucket/none: nothing there"):
        mirror.reading("memory://bucket/none", tmp_path)


def test_a_truncated_file_and_names_that_lead_out_are_refused(tmp_path):
    with mirror.opened(URL, tmp_path) as folder:
        write(folder, start__config="abc")
    Bucket(URL).write("start/config", b"a")
    with pytest.raises(InputError, match="one/start/config: expected 3 bytes, found 1"):
        mirror.reading(URL, tmp_path)
    Bucket(URL).write(mirror.LISTING, b'{"files": {"../../x": 1}}')
    with pytest.raises(InputError, match="expected names below the run's folder"):
        mirror.reading(URL, tmp_path)


def test_what_is_missing_is_named(monkeypatch):
    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=f"{scheme}://x/y: {package} has to be installed; .* `cloud`"):
            Bucket(f"{scheme}://x/y")
    with pytest.raises(InputError, match="nowhere://x: cannot be opened: ValueError: Protocol not known"):
        Bucket("nowhere://x")


def test_missing_credentials_name_the_path(monkeypatch):
    class NoCredentialsError(Exception):  # as the libraries have it: no OSError
        pass

    def refuse(*args, **more):
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", refuse)
    with pytest.raises(InputError, match="runs/one/x: cannot be read: NoCredentialsError: Unable to locate"):
        Bucket(URL).read("x")
