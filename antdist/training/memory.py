"""Give memory back to the system. glibc keeps what a step's large tensors leave between small ones; gigabytes pile up."""

from __future__ import annotations

import ctypes
import sys
import time

SECONDS = 10.0

_last = 0.0


def release_now_and_then() -> None:
    """Return the allocator's free pages to the system (about 40 ms), at most every ten seconds. Linux with glibc only."""
    global _last
    now = time.monotonic()
    if now - _last < SECONDS or not sys.platform.startswith("linux"):
        return
    _last = now
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
