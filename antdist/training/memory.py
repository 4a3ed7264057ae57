"""Memory between steps on a CPU: kept for the next step's tensors, and what is too much given back; what this process holds.
Linux with glibc only.

glibc takes each large tensor from the system and gives it back at once: the next one costs a page fault every 4 KiB, a
quarter of a step of adaptation. Told to keep them, it would in time pile up gigabytes between small tensors.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 10.0
KEPT = 1 << 30  # bytes; a tensor above that size goes back to the system at once
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

_last = 0.0


def keep_memory() -> None:
    """From now on what is freed in this process waits for the next tensor, until `release_now_and_then`."""
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def release_now_and_then() -> None:
    """Return the allocator's free pages to the system (about 40 ms), at most every ten seconds."""
    global _last
    now = time.monotonic()
    if now - _last < SECONDS:
        return
    _last = now
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(function: str) -> Any:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform.startswith("linux") else None


def peak_bytes() -> int:
    """The most memory that this process has held resident since it began, or since `forget_peak`. Linux."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """The memory that this process holds resident. Linux."""
    return _status("VmRSS")


def forget_peak() -> None:
    """Let `peak_bytes` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
