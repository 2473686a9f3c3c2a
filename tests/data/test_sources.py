"""Sources behind one interface: folder, LLaVA's JSON, photographs, and the door that opens them."""

from __future__ import annotations

import json
import pickle

import pytest

from tove_jax.config.schema import DataConfig
from tove_jax.data import make_source, records
from tove_jax.data.dialogue import blank_picture, dialogues_of
from tove_jax.data.folder import FolderSource
from tove_jax.data.llava import LlavaSource
from tove_jax.data.photographs import PhotographSource
from tove_jax.data.picture import BLANK
from tove_jax.errors import InputError


@pytest.fixture
def album(tmp_path, make_picture):
    """Four pictures: two cats, a dog deeper down, one without a label; and what is no picture."""
    files = {"cats/a.png": "PNG", "cats/b.JPG": "JPEG", "dogs/old/c.webp": "WEBP", "top.gif": "GIF"}
    for number, (name, kind) in enumerate(files.items()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(make_picture(number, kind))
    (tmp_path / "cats" / "notes.md").write_text("no picture")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails" / "a.png").write_bytes(b"")
    return tmp_path


ALBUM_IDS = ["cats/a.png", "cats/b.JPG", "dogs/old/c.webp", "top.gif"]


def test_folder(album, check_source):
    source = FolderSource(album)
    check_source(source)
    assert source.ids == ALBUM_IDS
    assert source.labels == ["cats", "cats", "dogs", None]
    assert source.captions == [None] * 4


def test_folder_follows_links_but_not_in_a_circle(album, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "d.png").write_bytes((album / "cats" / "a.png").read_bytes())
    (album / "linked").symlink_to(elsewhere)
    (album / "dogs" / "round").symlink_to(album)
    assert FolderSource(album).ids == [*ALBUM_IDS[:3], "linked/d.png", ALBUM_IDS[3]]


def test_folder_captions(album):
    (album / "captions.json").write_text(json.dumps({id: f"of {id}" for id in ALBUM_IDS}))
    source = FolderSource(album)
    assert source.captions == [f"of {id}" for id in ALBUM_IDS]
    assert source[2].caption == "of dogs/old/c.webp"
    (album / "captions.json").rename(album / "kept")
    (album / "captions.txt").write_text("".join(f"{id}\ttold of {id}\n\n" for id in ALBUM_IDS))
    assert FolderSource(album).captions == [f"told of {id}" for id in ALBUM_IDS]
    (album / "kept").rename(album / "captions.json")
    with pytest.raises(InputError, match="found both"):
        FolderSource(album)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({id: "x" for id in ALBUM_IDS[:3]}, "found none for 1 of 4, among them 'top.gif'"),
        ({id: " " for id in ALBUM_IDS}, "found none for 4 of 4"),
        ({"cats/a.pgn": "x"}, r"caption of 'cats/a.pgn' has no picture \(did you mean 'cats/a.png'"),
        (["x"], "captions.json: expected an object"),
    ],
)
def test_missing_captions_are_named(album, captions, message):
    (album / "captions.json").write_text(json.dumps(captions))
    with pytest.raises(InputError, match=message):
        FolderSource(album)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.json", "{", "captions.json: expected JSON"),
        ("captions.txt", "cats/a.png no tab", "captions.txt, line 1: expected path, tab, caption"),
        ("captions.txt", "a\tb\na\tc", "line 2: 'a' was captioned before"),
    ],
)
def test_damaged_caption_files(album, name, text, message):
    (album / name).write_text(text)
    with pytest.raises(InputError, match=message):
        FolderSource(album)


def test_empty_missing_and_damaged_folder(album, tmp_path):
    with pytest.raises(InputError, match="expected a folder of pictures, found nothing"):
        FolderSource(tmp_path / "absent")
    with pytest.raises(InputError, match="expected a folder of pictures, found a file"):
        FolderSource(album / "top.gif")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(InputError, match="empty: expected pictures .* found none"):
        FolderSource(tmp_path / "empty")
    source = FolderSource(album)
    (album / "cats" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="cats/a.png: .* found an empty one"):
        source[0]
    (album / "top.gif").unlink()
    with pytest.raises(InputError, match="top.gif: cannot be read"):
        source[3]


def turn(speaker, value):
    return {"from": speaker, "value": value}


def plain(id, image, caption="a cat"):
    return {"id": id, "image": image, "conversations": [turn("human", "<image>\nWhat?"), turn("gpt", caption)]}


TEXT_ONLY = {"id": "t", "conversations": [turn("human", "Hi"), turn("gpt", "Hello"), turn("human", "Bye")]}


def write_llava(album, records, name="data.json"):
    path = album / name
    path.write_text(json.dumps(records))
    return path


def test_llava(album, check_source):
    two = {"id": "two", "image": ["cats/b.JPG", "top.gif"], "conversations": [turn("human", "<image><image>Same?")]}
    two["conversations"].append({"weight": 1, "value": "No", "from": "gpt"})
    rows = [plain(7, "cats/a.png", " a cat\n"), plain("b", ["top.gif"]), TEXT_ONLY, plain("b", "./top.gif"), two]
    path = write_llava(album, rows)
    source = LlavaSource(path, album, blank_size=20)
    check_source(source)
    assert source.ids == ["cats/a.png", "top.gif", "cats/b.JPG", BLANK]
    assert source.captions == ["a cat", None, None, None]
    assert source.pictured == [True, True, True, False] and blank_picture(source) == 3
    assert source[3].image.shape == (20, 20, 3) and not source[3].image.any()
    assert [one.id for one in source.dialogues] == ["7", "b", "t", "b#2", "two"]
    assert [one.pictures for one in source.dialogues] == [(0,), (1,), (), (1,), (2, 1)]
    assert source.dialogues[2].turns == tuple(TEXT_ONLY["conversations"])
    assert source.dialogues[-1].turns[1] == turn("gpt", "No")
    assert [one.id for one in source.dialogues[1:3]] == ["b", "t"] and dialogues_of(source) is source.dialogues
    with pytest.raises(IndexError):
        source.dialogues[5]
    assert len(pickle.dumps(source)) < 500 + 2 * len(str(album))
    lines = album / "data.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    again = LlavaSource(lines, album)
    assert again.ids == source.ids and list(again.dialogues) == list(source.dialogues)


def test_llava_without_text_only_records_has_no_black_picture(album):
    source = LlavaSource(write_llava(album, [plain("a", "top.gif")]), album)
    assert source.ids == ["top.gif"] and source.pictured == [True] and blank_picture(source) is None


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**20])
def test_records_are_read_a_piece_at_a_time(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    values = [1, 23456, {"a": ["]", 'x"y', {}]}, [], "\ud83d é", None, -1.5e3]
    path = tmp_path / "some.json"
    for text in (json.dumps(values), "\ufeff \n" + json.dumps(values, indent=2, ensure_ascii=True) + "\n\n"):
        path.write_text(text, "utf-8")
        assert list(records.read_records(path)) == values
    for text, message in {
        "[]": "found none",
        "[1, 2": "after [12] records",
        "[1,]": "after 1 records",
        "[1 2]": "expected a comma or the list's end, found '2",
        "[1] 2": "text after the list's end",
        '{"a": 1}': "expected a list of records, found '{",
        "": "after 0 records",
    }.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            list(records.read_records(path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([plain("a", "cats/a.png"), plain("b", "cats/z.png")], r"picture .*cats/z.png is missing \(1 missing of 2"),
        ([plain("a", "nowhere/z.png")], "nowhere/z.png is missing"),
        ([{"id": "a", "image": "top.gif"}], r"record 0 \(id 'a'\): field conversations: expected a list of turns"),
        ([plain("a", "top.gif", "  ")], "turn 1 of 'gpt': expected text in value"),
        ([{"id": "a", "conversations": ["x"]}], "turn 0: expected an object"),
        ([plain("a#2", "top.gif"), plain("a", "top.gif"), plain("a", "top.gif")], "'a#2' collides with that of a"),
        ([plain("a", "../secret.png")], "inside the picture folder, found '../secret.png'"),
        ([plain("a", "/secret.png")], "inside the picture folder"),
        ([plain("a", 3)], "field image: expected a relative path, found 3"),
        ([{"image": "top.gif"}], "record 0: expected an object with an id"),
        ([], "expected a list of records, found none"),
        ({"id": "a"}, "expected a list of records, found '{"),
    ],
)
def test_llava_records_that_are_refused(album, rows, message):
    with pytest.raises(InputError, match=message):
        LlavaSource(write_llava(album, rows), album)


def test_llava_file_that_is_missing_or_no_json(album):
    with pytest.raises(InputError, match="absent.json cannot be read"):
        LlavaSource(album / "absent.json", album)
    (album / "bad.json").write_text("[{")
    with pytest.raises(InputError, match="bad.json: expected JSON"):
        LlavaSource(album / "bad.json", album)


def test_captions_make_conversations(album):
    with pytest.raises(InputError, match="'folder' has none for its 4 pictures"):
        dialogues_of(FolderSource(album))
    (album / "captions.json").write_text(json.dumps({id: f"of {id}" for id in ALBUM_IDS}))
    dialogues = dialogues_of(FolderSource(album))
    assert [(one.id, one.pictures) for one in dialogues] == [(id, (number,)) for number, id in enumerate(ALBUM_IDS)]
    assert dialogues[3].turns == (turn("human", "<image>"), turn("gpt", "of top.gif"))


def test_photographs():
    pytest.importorskip("skimage")
    source = PhotographSource()
    assert len(source) >= 12 and "astronaut" in source.ids
    assert len(source.licences) == len(source) and all(source.licences) and all(source.captions)
    assert source[source.ids.index("astronaut")].image.shape == (512, 512, 3)
    assert source[source.ids.index("camera")].image.shape == (512, 512, 3)


def test_door(album):
    assert make_source(DataConfig(source="folder", path=str(album))).ids == ALBUM_IDS
    path = write_llava(album, [plain("a", "top.gif"), TEXT_ONLY])
    source = make_source(DataConfig(source="llava", path=str(path), image_size=16))
    assert source[1].image.shape == (16, 16, 3)
    assert make_source(DataConfig(source="llava", path=str(path), images=str(album))).ids == ["top.gif", BLANK]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "folder"}, "data.path: the source folder needs a path"),
        ({"source": "openmoji", "path": "x"}, "data.path: the source openmoji takes no path, found 'x'"),
        ({"source": "zip", "path": "x"}, "data.source: expected openmoji, .* found 'zip'"),
        ({"source": "openmoji", "image_size": 4}, "data.image_size: expected 8 to 4096 pixels, found 4"),
    ],
)
def test_door_refuses(options, message):
    with pytest.raises(InputError, match=message):
        make_source(DataConfig(**options))
