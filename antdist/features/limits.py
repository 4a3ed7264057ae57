"""Raise the limit of open files: each mapped part keeps one open, and a catalogue has thousands."""

from __future__ import annotations

import resource
from pathlib import Path

from antdist.errors import UserError

OTHERS = 512  # files and maps for everything else: libraries, sockets, shards
MOST_MAPS = Path("/proc/sys/vm/max_map_count")


def raise_limits(maps: int) -> None:
    """Raise this process' limit of open files if it is too low for `maps` memory maps.

    Raises:
        UserError: the system does not allow so many open files or maps.
    """
    needed = maps + OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise _too_few("open files", hard, needed, f"ulimit -n {needed}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    allowed = int(MOST_MAPS.read_text()) if MOST_MAPS.is_file() else needed
    if allowed < needed:
        raise _too_few("memory maps", allowed, needed, f"sysctl -w vm.max_map_count={2 * needed}")


def _too_few(what: str, allowed: int, needed: int, command: str) -> UserError:
    return UserError(
        f"the features need {needed:,} {what}, but the system allows a process {allowed:,}",
        where="features",
        remedy=f"ask the administrator to raise the limit (`{command}`)",
    )
