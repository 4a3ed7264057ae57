"""What all tests share: the folder of real data, and quiet, deterministic processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# tests share the cores: one thread a process, or they spin against each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the project; tests that need it skip by name where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data absent: no folder ../shared/data beside the project")
    return SHARED_DATA
