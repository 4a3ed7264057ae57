"""Small files are whole or not there, whatever ends the writing."""

from __future__ import annotations

from pathlib import Path

import pytest

from antdist.errors import UserError
from antdist.io import files
from antdist.io.files import read_json, write_json


def test_json_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems put a name before the content: after a power cut the file would be there, and empty."""
    path, flushed = tmp_path / "run.json", []

    def flush(file: Path) -> None:
        flushed.append((read_json(file), read_json(path)))

    monkeypatch.setattr(files, "flush_to_disk", flush)
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    write_json(path, {"a": 3}, lasting=False)
    assert flushed == [({"a": 1}, None), ({"a": 2}, {"a": 1})]
    assert read_json(path) == {"a": 3} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    assert read_json(path) is None
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json: the file is damaged.*Restore it from a copy, or remove it"):
        read_json(path)
