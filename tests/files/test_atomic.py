"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tove_jax.errors import InputError
from tove_jax.files import atomic
from tove_jax.files.atomic import atomic_folder, atomic_write_bytes, atomic_write_json


@contextmanager
def small_disk():
    """No file of this process may exceed 4096 bytes: a write fails midway, as on a full disk.

    Around single calls only: the limit holds for the test runner's own log as well.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_write_and_replace(tmp_path):
    atomic_write_bytes(tmp_path / "deep" / "a", b"one")
    atomic_write_bytes(tmp_path / "deep" / "a", b"two")
    assert (tmp_path / "deep" / "a").read_bytes() == b"two"
    atomic_write_json(tmp_path / "b.json", {"z": 1, "a": "é"})
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == '{\n  "z": 1,\n  "a": "é"\n}\n'
    with pytest.raises(ValueError):
        atomic_write_json(tmp_path / "b.json", float("nan"))
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["z"] == 1
    assert sorted(os.listdir(tmp_path)) == ["b.json", "deep"]
    assert os.listdir(tmp_path / "deep") == ["a"]


def test_disk_full_midway_leaves_the_old_file(tmp_path):
    atomic_write_bytes(tmp_path / "a", b"old")
    with pytest.raises(InputError, match=r"/a: cannot be written: File too large"), small_disk():
        atomic_write_bytes(tmp_path / "a", bytes(10_000))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_no_space(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        atomic_write_bytes(tmp_path / "a", b"x")
    with pytest.raises(InputError, match="No space left on device"), atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("x")
    assert os.listdir(tmp_path) == []


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="File exists|Not a directory"):
        atomic_write_bytes(tmp_path / "file" / "a", b"x")
    with pytest.raises(InputError, match="File exists|Not a directory"), atomic_folder(tmp_path / "file" / "f"):
        pytest.fail("entered")
    with pytest.raises(InputError, match="found a file"), atomic_folder(tmp_path / "file"):
        pytest.fail("entered")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(InputError, match="Permission denied"):
            atomic_write_bytes(tmp_path / "locked" / "a", b"x")
    assert (tmp_path / "file").read_text() == "x"


def test_folder_success_failure_and_replacement(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "b").write_text("2")
        raise RuntimeError("stop")
    assert os.listdir(target) == ["sub"]
    with atomic_folder(target) as folder:
        (folder / "c").write_text("3")
    assert os.listdir(target) == ["c"]
    assert os.listdir(tmp_path) == ["out"]


def test_folder_disk_full_in_the_body(tmp_path):
    with pytest.raises(InputError, match="out: cannot be written"), atomic_folder(tmp_path / "out") as folder:
        with small_disk():
            (folder / "a").write_bytes(bytes(10_000))
    assert os.listdir(tmp_path) == []


def test_an_input_that_the_body_misses_is_not_blamed_on_the_target(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out"):
        open("/nonexistent/input")
    assert os.listdir(tmp_path) == []


def test_killed_writer_is_cleaned_up(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from tove_jax.files import atomic\n"
        "target = sys.argv[1]\n"
        "with atomic.atomic_folder(target) as folder:\n"
        "    (folder / 'a').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    assert not (tmp_path / "out").exists()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("whole")
    assert os.listdir(tmp_path) == ["out"]


def test_killed_between_the_two_renames(tmp_path):
    old = tmp_path / f".out.{atomic._HOST}-{os.getpid()}-00000000.old"
    old.mkdir()
    (old / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_living_writers_are_left_alone(tmp_path):
    other = tmp_path / f".a.{atomic._HOST}-{os.getppid()}-00000000.tmp"
    elsewhere = tmp_path / ".a.elsewhere-1-00000000.tmp"
    other.write_text("x")
    elsewhere.write_text("x")
    with atomic_folder(tmp_path / "f") as outer, atomic_folder(tmp_path / "f") as inner:
        assert outer.exists() and inner.exists()
    atomic_write_bytes(tmp_path / "a", b"x")
    assert other.exists() and elsewhere.exists()


def test_many_writers_of_one_folder(tmp_path):
    def write(number):
        for _ in range(5):
            with atomic_folder(tmp_path / "out") as folder:
                (folder / "a").write_text(str(number))
                (folder / "b").write_text(str(number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == (tmp_path / "out" / "b").read_text()
