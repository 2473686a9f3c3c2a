"""The table, the check and the sheet of `tove data`."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
from PIL import Image

from tove_jax.cli import data as command
from tove_jax.config.schema import Config, DataConfig
from tove_jax.data.decode import read_picture
from tove_jax.data.folder import FolderSource
from tove_jax.data.overview import contact_sheet, counts_table, find_broken
from tove_jax.data.split import Split
from tove_jax.errors import InputError


@pytest.fixture
def album(tmp_path):
    for number in range(12):
        folder = tmp_path / "album" / ("cats" if number < 8 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (20 * number, 0, 255)).save(folder / f"{number:02d}.png")
    return tmp_path / "album"


def run(album, **options):
    options = {"sheet": None, "count": 60, "check": False, **options}
    config = Config(data=DataConfig(source="folder", path=str(album)))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert set(vars(parser.parse_args([]))) == set(options)
    return command.run(argparse.Namespace(config=config, **options))


def test_counts(album):
    source = FolderSource(album)
    table = counts_table(source, Split(np.array([0, 1, 8]), np.array([2, 9, 10])))
    assert [line.split() for line in table.splitlines()] == [
        ["label", "train", "held", "out", "all"],
        ["cats", "2", "1", "3"],
        ["dogs", "1", "2", "3"],
        ["total", "3", "3", "6"],
    ]


def test_many_labels_share_a_line():
    class Source:
        labels = [f"label-{i}" for i in range(40)] + [None]

    lines = counts_table(Source(), Split(np.arange(41), np.array([], int))).splitlines()
    assert len(lines) == 1 + 30 + 1 + 1
    assert lines[-2].split() == ["(11", "more", "labels)", "11", "0", "11"]


def test_sheet_shows_pictures_in_order(album, tmp_path):
    source = FolderSource(album)
    assert contact_sheet(source, np.arange(12), tmp_path / "sheet.png", cell=32) == 12
    sheet = read_picture(tmp_path / "sheet.png")
    reds = [int(sheet[6 + 10 + row * 52, 6 + 10 + column * 38, 0]) for row in range(3) for column in range(4)]
    assert reds == [20 * number for number in range(12)]
    assert contact_sheet(source, np.arange(12), tmp_path / "sheet.png", count=5) == 5
    with pytest.raises(InputError, match="contact sheet"):
        contact_sheet(source, [], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_command(album, tmp_path, capsys):
    assert run(album, sheet=tmp_path / "sheet.png", check=True) == 0
    out = capsys.readouterr().out
    assert "folder, 12 pictures" in out and "all 12 pictures can be decoded" in out and "12 pictures on" in out
    (album / "cats" / "03.png").write_bytes(b"")
    assert find_broken(FolderSource(album), range(12)) == [
        f"picture {album}/cats/03.png: expected a picture file, found an empty one (0 bytes)"
    ]
    assert run(album, check=True) == 1
    assert "1 of 12 pictures are broken" in capsys.readouterr().out
