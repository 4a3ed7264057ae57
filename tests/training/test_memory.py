"""The allocator: freed memory is kept for the next step, and trimmed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from antdist.training import memory


def resident() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_trim_returns_freed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_last", 0.0)
    blocks = [bytearray(100_000) for _ in range(2000)]  # below glibc's threshold for separate mappings
    kept = blocks[::50]
    full = resident()
    del blocks
    memory.trim_periodically()
    assert len(kept) == 40 and full - resident() > 100_000_000


FAULTS = """
import resource, sys, torch
from antdist.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    for _ in range(5):
        a = torch.ones(12 << 20)
        b = a * 2
        c = a[: 10 << 20] + b[: 10 << 20]
use()
before = faults()
use()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_kept_memory_avoids_page_faults() -> None:
    """Page faults of repeated tensors of 40 and 48 MB, with and without `keep_freed_memory`."""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "give back")
    )
    assert given_back > 50
    assert kept < given_back / 3
