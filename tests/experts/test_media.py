"""Mapped files: what is asked of the disk, and damage that arises after opening."""

from __future__ import annotations

import mmap

import pytest

from tove_jax.experts import media


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "shard.records"
    writer = media.open_writer("mmap", path, 5000)
    for number in range(200):
        writer.write(bytes([number]) * 5000)
    writer.close()
    return path


class _Map:
    """Stands before a map and remembers what is asked of the system."""

    def __init__(self, inner, asked):
        self.inner, self.asked = inner, asked

    def __len__(self):
        return len(self.inner)

    def madvise(self, option, start=0, length=0):
        self.asked.append((option, start, length))
        self.inner.madvise(option, start, length)


def _reader(path, exact):
    reader = media.open_reader("mmap", path, 5000, exact)
    asked = []
    reader._map = _Map(reader._map, asked)
    return reader, asked


@pytest.mark.parametrize("exact", [False, True])
def test_records_lie_at_multiples_of_64(path, exact):
    assert media.stride(5000) == 5056 == media.stride(5056) and path.stat().st_size == 200 * 5056
    reader = media.open_reader("mmap", path, 5000, exact)
    for position in (7, 199, 0, 8, 9):
        assert bytes(reader.read(position)) == bytes([position]) * 5000
    with pytest.raises(IndexError):
        reader.read(200)


def test_random_order_asks_for_the_record_alone_once(path):
    reader, asked = _reader(path, exact=True)
    for position in (150, 20, 150):
        reader.read(position)
    assert [option for option, _, _ in asked] == [mmap.MADV_WILLNEED] * 2
    for (_, start, length), position in zip(asked, (150, 20), strict=True):
        assert start % mmap.PAGESIZE == 0 and start <= position * 5056 < start + mmap.PAGESIZE
        assert start + length == (position + 1) * 5056
    reader, asked = _reader(path, exact=False)
    for position in (150, 20, 150):
        reader.read(position)
    assert asked == []


@pytest.mark.parametrize("exact", [False, True])
def test_stored_order_asks_ahead_in_windows(path, exact, monkeypatch):
    monkeypatch.setattr(media, "_WINDOW", 40 * 5056)
    reader, asked = _reader(path, exact)
    for position in range(200):
        reader.read(position)
    assert len(asked) <= 200 // 20 + 2
    end = 0
    for _, start, length in asked:
        assert start <= max(end, 5056)
        end = max(end, start + length)
    assert end == 200 * 5056
