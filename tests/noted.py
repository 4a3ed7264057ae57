"""Storage for tests: a folder as `noted://FOLDER` that logs openings, and fails or delays on request."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

LOG, AWAY = "NOTED_LOG", "NOTED_AWAY"  # files: one line for each opening; while it exists, every request fails
SLOW = "NOTED_SLOW"  # seconds of delay for each opening


class Noted(LocalFileSystem):
    protocol = "noted"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return super()._strip_protocol(str(path).removeprefix("noted://"))

    def info(self, path: str, **options: Any) -> Any:
        _answer()
        return super().info(path, **options)

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        _answer()
        return super().ls(path, detail=detail, **options)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        _answer()
        if log := os.environ.get(LOG):
            with Path(log).open("a") as file:  # a short line, so it is written in one piece
                file.write(f"{Path(path).name}\n")
        if slow := os.environ.get(SLOW):
            time.sleep(float(slow))
        return super()._open(path, mode, **options)


def _answer() -> None:
    if (away := os.environ.get(AWAY)) and Path(away).exists():
        raise OSError("connection refused")


fsspec.register_implementation("noted", Noted, clobber=True)


def opened(log: Path) -> Counter[str]:
    """Count how often each file was opened."""
    return Counter(log.read_text().split()) if log.is_file() else Counter()
