"""The machine that a benchmark ran on: processor, memory, GPU, versions, commit."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from antdist.tracking.tags import environment_tags


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(threads: int) -> dict[str, Any]:
    """Return facts for the foot of a report, by name. `threads` are those of torch."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": cores(),
        "threads": threads,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "busy": f"{os.getloadavg()[0]:.1f} processes on average in the last minute",
        "gpu": _gpu(),
        "system": platform.platform(),
    }
    tags = environment_tags(Path(__file__).parent)
    facts["versions"] = ", ".join(f"{k.split('.')[1]} {v}" for k, v in tags.items() if k.startswith("version."))
    commit = tags.get("mlflow.source.git.commit")
    if commit:
        facts["commit"] = commit[:12] + (" with changes" if tags.get("git.changed") == "true" else "")
    return facts


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    for line in described.read_text().splitlines() if described.is_file() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    found = torch.cuda.get_device_properties(0)
    return (
        f"{torch.cuda.device_count()} x {found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    )
