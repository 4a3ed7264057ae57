"""File locks: flock, which the system releases when the process dies."""

from __future__ import annotations

import fcntl
import time
from typing import IO, Any


def try_lock(file: IO[Any] | int, *, seconds: float = 0.0, shared: bool = False) -> bool:
    """Lock an open file (or folder's descriptor) and return whether that succeeded in time.

    Closing it releases the lock.

    By hand rather than by filelock, which has no shared lock on Unix, cannot lock a folder, and fails on a file system
    without locks: there the work must still start, so that counts as locked. For a shared lock over NFS the file must be open
    for reading, for an exclusive one for writing.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return True
