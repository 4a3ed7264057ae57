"""A storage for tests: a local folder as `recorded://FOLDER` that logs what is opened, and fails or is slow on demand."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

LOG = "RECORDED_LOG"  # a file with one line per opening
AWAY = "RECORDED_AWAY"  # while this file exists, the storage does not answer
SLOW = "RECORDED_SLOW"  # seconds that an opening takes


class RecordingFileSystem(LocalFileSystem):
    protocol = "recorded"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return super()._strip_protocol(str(path).removeprefix("recorded://"))

    def info(self, path: str, **options: Any) -> Any:
        _fail_if_away()
        return super().info(path, **options)

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        _fail_if_away()
        return super().ls(path, detail=detail, **options)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        _fail_if_away()
        if log := os.environ.get(LOG):
            with Path(log).open("a") as file:  # a short line, so atomic among processes
                file.write(f"{Path(path).name}\n")
        if slow := os.environ.get(SLOW):
            time.sleep(float(slow))
        return super()._open(path, mode, **options)


def _fail_if_away() -> None:
    if (away := os.environ.get(AWAY)) and Path(away).exists():
        raise OSError("connection refused")


fsspec.register_implementation("recorded", RecordingFileSystem, clobber=True)


def count_opened(log: Path) -> Counter[str]:
    """Count how often each file was opened."""
    return Counter(log.read_text().split()) if log.is_file() else Counter()
