"""Files and folders that are there whole or not at all."""

import json
import os

import pytest

from qlatrain import files
from qlatrain.files import WriteError, folder_written_aside, make_folder, write_aside, write_json


def listing(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "target"
    with folder_written_aside(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("content")
        assert not target.exists() and folder.parent == target.parent
    assert listing(tmp_path) == ["deep", "deep/target", "deep/target/sub", "deep/target/sub/file"]


def test_folder_takes_the_place_of_another_whole(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").write_text("old")
    with folder_written_aside(tmp_path / "target") as folder:
        (folder / "new").write_text("new")
        assert listing(tmp_path / "target") == ["old"]
    assert listing(tmp_path) == ["target", "target/new"]


def test_folder_begins_empty_after_a_kill(tmp_path):
    (tmp_path / ".target.partial").mkdir()
    (tmp_path / ".target.partial" / "half").write_text("half")
    with folder_written_aside(tmp_path / "target") as folder:
        assert listing(folder) == []
    assert listing(tmp_path) == ["target"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ZeroDivisionError("a bug")])
def test_an_error_leaves_what_was_there(tmp_path, error):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").write_text("old")
    kind = WriteError if isinstance(error, OSError) else ZeroDivisionError  # a bug stays what it is
    with pytest.raises(kind) as caught, folder_written_aside(tmp_path / "target") as folder:
        (folder / "half").write_text("half")
        raise error
    assert listing(tmp_path) == ["target", "target/old"]
    if kind is WriteError:
        assert f"{tmp_path / 'target'} could not be written: " in str(caught.value)
        assert "No space left on device" in str(caught.value)


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    sync, replace = files._sync, os.replace
    monkeypatch.setattr(files, "_sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with folder_written_aside(tmp_path / "target") as folder:
        (folder / "one").write_text("1")
        (folder / "two").write_text("2")
    assert set(events[:2]) == {"one", "two"}
    assert events[2:] == [".target.partial", "rename", tmp_path.name]


def test_write_aside(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_aside(target, "ä first")
    write_json(tmp_path / "file.json", {"a": [1, None]})
    assert target.read_bytes().decode("utf-8") == "ä first"
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": [1, None]}

    def refuse(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_sync", refuse)
    with pytest.raises(WriteError, match=r"file could not be written: .*No space left on device"):
        write_aside(target, "second")
    assert target.read_text(encoding="utf-8") == "ä first"
    assert listing(tmp_path) == ["file", "file.json"]


def test_make_folder(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file/c could not be written: "):
        make_folder(tmp_path / "file" / "c")
