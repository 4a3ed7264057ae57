"""Files: write them atomically and durably, read and digest them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from antdist.errors import UserError

# What is flushed to disk, and when:
# none    nothing. Other processes see the old file or the new one; after a power cut the new one may be empty.
# file    the content, before the name. After a power cut there is the old file or the new one.
# folder  the name, too, before the writer goes on. For a file that something written later vouches for.
Sync = Literal["none", "file", "folder"]


@contextlib.contextmanager
def write_atomically(path: Path, *, sync: Sync = "file", suffix: str = ".partial") -> Iterator[Path]:
    """Yield a temporary path to write.

    When the block ends, the file replaces `path`, so that nobody reads half of it.

    If the block fails, the temporary file is removed and `path` is as before. A killed process leaves it behind: the next one
    overwrites it, unless its `suffix` is of another process.

    Args:
        suffix: of the temporary name; `writer_suffix()` where several processes may write the same file at once.
    """
    temporary = path.with_name(f".{path.name}{suffix}")
    try:
        yield temporary
        if sync != "none":
            flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the block's error counts
            temporary.unlink(missing_ok=True)
        raise
    if sync == "folder":
        flush_to_disk(path.parent)


def writer_suffix() -> str:
    """Return a suffix that no other process on any node uses."""
    return f".{socket.gethostname()}-{os.getpid()}.tmp"


@contextlib.contextmanager
def write_folder_atomically(folder: Path, temporary: Path) -> Iterator[Path]:
    """Yield the empty folder `temporary` to fill; when the block ends, it is renamed to `folder`.

    What a killed process left in `temporary` is removed first, and so is the folder if the block fails.
    """
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any], *, sync: Sync = "file") -> None:
    """Write JSON atomically."""
    with write_atomically(path, sync=sync, suffix=writer_suffix()) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read the JSON object in a file; None if there is no such file.

    Raises UserError if it holds anything else.
    """
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
    """Return the hexadecimal SHA-256 digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Flush a file or folder to disk (fsync), so that later writes cannot become durable before this one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
