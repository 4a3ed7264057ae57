"""Linters for cluster/: from this environment, else from the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
CLUSTER = PROJECT / "cluster"


def lint(program: str, *arguments: str | Path) -> str:
    """Return the program's complaints, or "". Skips the test if the program is not installed."""
    found = shutil.which(program, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([found, *arguments], capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else (done.stdout + done.stderr) or f"{program} failed"
