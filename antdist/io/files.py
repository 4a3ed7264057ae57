"""Small things about files that every room needs: whole or not at all, down to the disk, and what is in them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from antdist.errors import UserError


def write_json(path: Path, content: dict[str, Any], *, lasting: bool = True) -> None:
    """Write JSON so that a reader sees the whole file or none, after a power cut, too; that is left out of what is not
    `lasting`, as it costs the time of a disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if lasting:
        flush_to_disk(temporary)
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file, or None if there is no such file. Raises UserError: something else is in it."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(
            "the file is damaged: it holds no JSON object", where=path, remedy="restore it from a copy, or remove it"
        )
    return content


def file_sha256(path: Path) -> str:
    """The digest of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Of a file or folder, so that what is written after it never survives a power cut that it does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
