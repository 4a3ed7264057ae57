"""Memory of a CPU process: keep what is freed for the next step, trim it, measure it (Linux, glibc).

By default glibc maps each large tensor and unmaps it when freed, so the next one costs a page fault every 4 KiB: a
quarter of a step of adaptation. If it keeps them all, fragmentation grows to gigabytes in time, hence the trimming.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

TRIM_SECONDS = 10.0
KEPT_BYTES = 1 << 30  # larger tensors return to the system at once
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

_last = 0.0


def keep_freed_memory() -> None:
    """Keep memory that this process frees for its next tensors, until `trim_periodically`."""
    mallopt = _glibc_function("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def trim_periodically() -> None:
    """Return the allocator's free pages to the system (about 40 ms), at most every ten seconds."""
    global _last
    now = time.monotonic()
    if now - _last < TRIM_SECONDS:
        return
    _last = now
    trim = _glibc_function("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc_function(function: str) -> Any:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform.startswith("linux") else None


def peak_bytes() -> int:
    """Return the peak resident memory of this process since its start or the last `reset_peak`. Linux."""
    return _status_bytes("VmHWM")


def resident_bytes() -> int:
    """Return the resident memory of this process. Linux."""
    return _status_bytes("VmRSS")


def reset_peak() -> None:
    """Restart the measurement of `peak_bytes`."""
    Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
