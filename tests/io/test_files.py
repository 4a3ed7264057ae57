"""Small files are whole or not there, whatever ends the writing."""

from __future__ import annotations

from pathlib import Path

import pytest

from antdist.errors import UserError
from antdist.io import files
from antdist.io.files import Sync, read_json, write_atomically, write_folder_atomically, write_json


def test_json_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems put a name before the content: after a power cut the file would be there, and empty."""
    path, flushed = tmp_path / "run.json", []

    def flush(file: Path) -> None:
        flushed.append((read_json(file), read_json(path)))

    monkeypatch.setattr(files, "flush_to_disk", flush)
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    write_json(path, {"a": 3}, sync="none")
    assert flushed == [({"a": 1}, None), ({"a": 2}, {"a": 1})]
    assert read_json(path) == {"a": 3} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    assert read_json(path) is None
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json: the file is damaged.*Restore it from a copy, or remove it"):
        read_json(path)


@pytest.mark.parametrize("sync", ["none", "file", "folder"])
def test_a_file_is_replaced_once_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: Sync) -> None:
    path, flushed = tmp_path / "weights", []
    path.write_text("old")
    monkeypatch.setattr(files, "flush_to_disk", lambda place: flushed.append((place, path.read_text())))
    with write_atomically(path, sync=sync) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    content, name = (temporary, "old"), (tmp_path, "new")
    assert flushed == {"none": [], "file": [content], "folder": [content, name]}[sync]
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), write_atomically(path) as temporary:
        temporary.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_its_place_once_it_is_complete(tmp_path: Path) -> None:
    folder, temporary = tmp_path / "domain", tmp_path / ".domain.partial"
    temporary.mkdir()
    (temporary / "left by a kill").touch()
    with pytest.raises(OSError, match="full"), write_folder_atomically(folder, temporary):
        raise OSError("the disk is full")
    assert list(tmp_path.iterdir()) == []
    with write_folder_atomically(folder, temporary) as partial:
        (partial / "shard").touch()
        assert not folder.exists()
    assert list(tmp_path.rglob("*")) == [folder, folder / "shard"]
