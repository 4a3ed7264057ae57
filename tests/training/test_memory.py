"""Memory that the allocator keeps between a step's tensors goes back to the system."""

from __future__ import annotations

import sys

import pytest

from antdist.training import memory


def resident() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_freed_blocks_below_live_ones_are_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_last", 0.0)
    blocks = [bytearray(100_000) for _ in range(2000)]  # below glibc's limit for blocks of their own
    kept = blocks[::50]
    full = resident()
    del blocks
    memory.release_now_and_then()
    assert len(kept) == 40 and full - resident() > 100_000_000
