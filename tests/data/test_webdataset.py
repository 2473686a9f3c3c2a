"""Tars: patterns, members by offset, the kept index, and damage."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest

from tove_jax.config.schema import DataConfig
from tove_jax.data import make_source, webdataset
from tove_jax.data.decode import decode
from tove_jax.data.webdataset import WebDatasetSource, expand_pattern
from tove_jax.errors import InputError


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def tars(tmp_path, make_picture):
    """Two tars: captions in text and JSON, labels in cls and JSON, a licence beside the samples."""
    write_tar(
        tmp_path / "part-000.tar",
        [
            ("LICENCE", b"free"),
            ("x/a.png", make_picture(0)),
            ("x/a.txt", b" a cat \n"),
            ("x/a.cls", b"3"),
            ("b.jpg", make_picture(1, "JPEG")),
        ],
    )
    said = json.dumps({"caption": "in JSON", "label": "dogs"}).encode()
    write_tar(tmp_path / "part-001.tar", [("a.json", said), ("a.WebP", make_picture(2, "WEBP"))])
    return tmp_path


def test_samples(tars, make_picture, check_source):
    source = WebDatasetSource(expand_pattern(f"{tars}/part-{{000..001}}.tar"), cache=tars / "cache")
    check_source(source)
    assert source.ids == ["part-000/x/a", "part-000/b", "part-001/a"]
    assert source.captions == ["a cat", None, "in JSON"]
    assert source.labels == ["3", None, "dogs"]
    np.testing.assert_array_equal(source[0].image, decode(make_picture(0), "a"))


def test_door_and_glob(tars):
    config = DataConfig(source="webdataset", path=f"{tars}/*.tar", cache=str(tars / "cache"))
    assert make_source(config).ids == ["part-000/x/a", "part-000/b", "part-001/a"]


def test_index_is_made_once_and_anew_when_the_tar_changes(tars, make_picture, monkeypatch):
    path, made = tars / "part-000.tar", []
    index_tar = webdataset._index_tar
    monkeypatch.setattr(webdataset, "_index_tar", lambda path: made.append(path) or index_tar(path))
    for _ in range(2):
        source = WebDatasetSource([path], cache=tars / "cache")
    assert len(made) == 1 and source[1].image.shape == (10, 12, 3)
    write_tar(path, [("other.png", make_picture(5, size=(4, 4)))])
    assert WebDatasetSource([path], cache=tars / "cache").ids == ["part-000/other"]
    assert len(made) == 2
    for kept in (tars / "cache" / "tar-index").iterdir():
        kept.write_text("{")
    assert WebDatasetSource([path], cache=tars / "cache").ids == ["part-000/other"]
    assert len(made) == 3


def test_patterns(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b-1"):
        (tmp_path / f"{name}.tar").touch()

    def names(pattern):
        return [path.stem for path in expand_pattern(f"{tmp_path}/{pattern}")]

    assert names("a-{08..10}.tar") == ["a-08", "a-09", "a-10"]
    assert names("{b-1,a-09}.tar") == ["b-1", "a-09"]
    assert names("{a,b}-*.tar") == ["a-08", "a-09", "a-10", "b-1"]
    assert names("a-{09..09}.tar") == ["a-09"]
    for pattern, message in {
        "c-*.tar": "found none that match",
        "a-{08..11}.tar": "a-11.tar, which is not a file",
        "a-{3..1}.tar": "ascending range",
    }.items():
        with pytest.raises(InputError, match=message):
            names(pattern)


def test_truncated_anywhere(tars, tmp_path):
    whole = (tars / "part-000.tar").read_bytes()
    with tarfile.open(tars / "part-000.tar") as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    assert whole[end : end + 512] == bytes(512)
    for number, keep in enumerate([0, 100, 700, 1500, end - 300, end - 512, end, end + 100]):
        path = tmp_path / f"cut-{number}.tar"
        path.write_bytes(whole[:keep])
        with pytest.raises(InputError, match=f"cut-{number}.tar: "):
            WebDatasetSource([path], cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_truncated_after_opening(tars):
    source = WebDatasetSource([tars / "part-000.tar"], cache=tars / "cache")
    os.truncate(tars / "part-000.tar", 1600)
    with pytest.raises(InputError, match=r"part-000.tar: truncated: picture 'part-000/x/a' has \d+ of \d+ bytes"):
        source[0]


def test_damaged_header_in_the_middle(tars):
    path = tars / "part-000.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"x/a.cls")
    data[at] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"truncated or corrupt: .* at byte {at} of {len(data)}"):
        WebDatasetSource([path], cache=tars / "cache")


def test_refused_tars(tars, make_picture):
    picture = make_picture(0)
    cases = {
        "expected a picture .* found only .txt": [("a.txt", b"x")],
        "sample 'a' has two members of kind 'picture'": [("a.png", picture), ("a.jpg", picture)],
        "'a.txt': expected UTF-8": [("a.png", picture), ("a.txt", b"\xff")],
        "'a.json': expected JSON": [("a.png", picture), ("a.json", b"{")],
        "expected a JSON object, found list": [("a.png", picture), ("a.json", b"[]")],
        "expected pictures in": [("README", b"x")],
    }
    for number, (message, members) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message):
            WebDatasetSource([write_tar(tars / f"{number}.tar", members)], cache=tars / "cache")
    packed = tars / "packed.tar"
    packed.write_bytes(gzip.compress((tars / "part-000.tar").read_bytes()))
    with pytest.raises(InputError, match="packed.tar: expected an uncompressed tar"):
        WebDatasetSource([packed], cache=tars / "cache")
    (tars / "deeper").mkdir()
    twin = write_tar(tars / "deeper" / "part-001.tar", [("a.png", picture)])
    with pytest.raises(InputError, match="id 'part-001/a' was already seen in"):
        WebDatasetSource([tars / "part-001.tar", twin], cache=tars / "cache")


def test_a_damaged_picture_names_tar_and_sample(tars, make_picture):
    path = write_tar(tars / "bad.tar", [("a.png", make_picture(0)[:100])])
    with pytest.raises(InputError, match="bad.tar:bad/a: .*corrupt"):
        WebDatasetSource([path], cache=tars / "cache")[0]
