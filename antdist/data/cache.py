"""A bounded cache of remote files on a node's disk, named by SHA-256, shared by all processes.

FOLDER/
  <digest>           a complete file; its digest is checked whenever it is opened, since disks fail
  <digest>.partial   a file that is being fetched, allocated in full from the start; its fetcher holds an exclusive lock
  lock               held while room is made, so that complete and partial files together never exceed the bound; it
                     contains their total bytes, so that the folder is scanned only if files must be evicted

A file's name is the digest of its content, so nothing can be stale, and domains, runs and ranks share equal files. Readers
hold a shared lock (flock) on the files that they have opened, which keeps them; other files are evicted when room is
needed, the least recently used first. Locks end with the process, so the next process continues or removes what a killed
one left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from antdist.data.entries import File
from antdist.errors import UserError
from antdist.io.logs import get_logger
from antdist.io.storage import Unreachable, is_uri

logger = get_logger(__name__)

GB = 10**9
DEFAULT_GB = 50.0
CACHE_KEY = "data.cache"
WAITS = (1.0, 5.0, 15.0)  # seconds between attempts to fetch a file
POLL_SECONDS = 0.02  # while another process fetches the same file, or uses files that must be evicted
FULL_SECONDS = 120.0  # how long to wait while files in use fill the cache
MOST_FETCHES = 10  # of a file that is removed or damaged each time it has been fetched
FULL = (errno.ENOSPC, errno.EDQUOT)
_CACHE_FILE = re.compile(r"[0-9a-f]{64}(\.partial)?")

Source = Callable[[], Generator[bytes, None, None]]


class CorruptDownload(UserError):
    """A fetched file does not match the manifest; a retry may help."""

    def __init__(self, where: str, what: str) -> None:
        remedy = "check the remote domain with `antdist verify`, and upload the file again"
        super().__init__(f"the fetched file does not match the manifest: {what}", where=where, remedy=remedy)


@dataclass(frozen=True)
class Cache:
    """A cache of at most `bound` bytes of files in `folder`."""

    folder: Path
    bound: int

    def open(self, file: File, source: Source, where: str) -> BinaryIO:
        """Open a file with its size and digest checked; fetch it from `source` if it is not cached.

        An open file stays in the cache; after it is closed it may be evicted.

        Args:
            source: yields the content in chunks.
            where: the file's place in the source, for messages.

        Raises:
            Unreachable, CorruptDownload: at every one of the attempts that `WAITS` allows.
            UserError: the file is missing, does not fit, or the disk is full.
        """
        waits, fetches = iter(WAITS), 0
        while fetches < MOST_FETCHES:
            if (held := self._open_cached(file)) is not None:
                return held
            try:
                with self._lock_partial(file) as partial:
                    if partial is not None:
                        fetches += 1
                        self._fetch(file, partial, source, where)
                        continue
            except FileNotFoundError:  # the folder has just been removed
                continue
            except (Unreachable, CorruptDownload) as error:
                if (wait := next(waits, None)) is None:
                    raise
                logger.warning(f"{error} Trying again")
                time.sleep(wait)
            else:
                time.sleep(POLL_SECONDS)
        raise UserError(
            f"the cache's disk does not keep what is written ({file.name})",
            where=f"{CACHE_KEY} {self.folder}",
            remedy=f"check its disk, or use a folder on another disk with {CACHE_KEY}=FOLDER",
        )

    def has(self, file: File) -> bool:
        """Return whether the file is cached, by its name and size alone."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / file.sha256).stat().st_size == file.bytes
        return False

    def usable_bytes(self) -> int:
        """Return how many bytes the cache can hold: its bound, or less if the disk is too full."""
        self._make_folder()
        taken = sum(size for _, size, _ in self._files())
        return min(self.bound, taken + _free_bytes(self.folder))

    def _open_cached(self, file: File) -> BinaryIO | None:
        """Open the file if it is cached and intact; remove it if it is damaged."""
        path = self.folder / file.sha256
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(stream, fcntl.LOCK_SH)
            if not os.fstat(stream.fileno()).st_nlink:  # removed before it was locked
                stream.close()
                return None
            now = time.time_ns()
            os.utime(stream.fileno(), ns=(now, now))  # for eviction; the kernel's own time stamps are coarse
            if hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256:
                stream.seek(0)
                return stream
        except OSError as error:
            logger.warning(f"{path} cannot be read ({error.strerror})")
        except BaseException:
            stream.close()
            raise
        stream.close()
        logger.warning(f"{path} is damaged ({file.name}), fetching it again")
        path.unlink(missing_ok=True)
        return None

    @contextlib.contextmanager
    def _lock_partial(self, file: File) -> Iterator[IO[bytes] | None]:
        """Open the partial file under an exclusive lock; None if another process fetches or has fetched it."""
        path = self.folder / f"{file.sha256}.partial"
        self._make_folder()
        try:
            stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
        except FileNotFoundError:  # the folder has just been removed
            yield None
            return
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if not os.fstat(stream.fileno()).st_nlink:  # removed, as left by a killed process, before it was locked
                yield None
            elif (self.folder / file.sha256).exists():  # fetched by another process before it was locked
                path.unlink(missing_ok=True)
                yield None
            else:
                yield stream

    def _fetch(self, file: File, partial: IO[bytes], source: Source, where: str) -> None:
        """Fetch the file from `source`, atomically."""
        path = self.folder / f"{file.sha256}.partial"
        try:
            self._reserve(file.bytes, partial)
            digest, size = hashlib.sha256(), 0
            with contextlib.closing(source()) as pieces:
                for piece in pieces:
                    size += len(piece)
                    if size > file.bytes:
                        raise CorruptDownload(where, f"it has more than {file.bytes} bytes")
                    digest.update(piece)
                    partial.write(piece)
            if size != file.bytes:
                raise CorruptDownload(where, f"it ends after {size} of {file.bytes} bytes")
            if digest.hexdigest() != file.sha256:
                raise CorruptDownload(where, "its SHA-256 differs")
            partial.flush()
            with self._lock_folder():  # a concurrent scan of the folder could miss both names
                path.rename(self.folder / file.sha256)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in FULL:
                raise UserError(
                    f"the disk has no room for {file.bytes / GB:.3g} GB more",
                    where=f"{CACHE_KEY} {self.folder}",
                    remedy=f"free space, or use a folder on another disk with {CACHE_KEY}=FOLDER",
                ) from error
            raise

    # -- room ---------------------------------------------------------------------------------------------------------

    def _reserve(self, size: int, partial: IO[bytes]) -> None:
        """Allocate `partial` in full, once there is room for it.

        Raises:
            UserError: the file is larger than the bound, or files in use leave no room for it.
            OSError: the disk is full.
        """
        partial.truncate(0)  # content left by a killed process
        deadline = time.monotonic() + FULL_SECONDS
        while True:
            with self._lock_folder() as lock:
                recorded = lock.read()
                taken = int(recorded) if recorded.isdigit() else self.bound
                if size <= self.bound and (taken + size > self.bound or size > _free_bytes(self.folder)):
                    taken = self._make_room(size)
                if taken + size <= self.bound:
                    # The recorded total may be too high, never too low: files removed otherwise are noticed by a scan.
                    lock.truncate(0)
                    lock.write(str(taken + size).encode())
                    lock.flush()
                    _allocate(partial, size)
                    return
            if size > self.bound or time.monotonic() > deadline:
                what = "is larger than the cache" if size > self.bound else "does not fit beside the files in use"
                raise UserError(
                    f"a file of {size / GB:.3g} GB {what} of {self.bound / GB:.3g} GB",
                    where=f"{CACHE_KEY} {self.folder}",
                    remedy="raise data.cache_gb; `antdist validate` prints how much a run needs",
                )
            time.sleep(POLL_SECONDS)

    @contextlib.contextmanager
    def _lock_folder(self) -> Iterator[IO[bytes]]:
        """Lock the folder; the lock file contains the total bytes of complete and partial files."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                self._make_folder()
                lock = (self.folder / "lock").open("a+b")
                break
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            yield lock

    def _make_room(self, size: int) -> int:
        """Evict least recently used files until `size` bytes fit; return the bytes of the remaining files."""
        files = sorted(self._files())
        taken, short = sum(found for _, found, _ in files), size - _free_bytes(self.folder)
        for _, found, path in files:
            if taken + size <= self.bound and short <= 0:
                break
            if found and _try_remove(path):
                taken, short = taken - found, short - found
        return taken

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Give time of last use, bytes and path of each file; files with other names are ignored."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if _CACHE_FILE.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        yield found.st_mtime_ns, found.st_size, Path(entry.path)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the folder cannot be created ({error.strerror})",
                where=f"{CACHE_KEY} {self.folder}",
                remedy=f"use another folder with {CACHE_KEY}=FOLDER",
            ) from None


def default_folder() -> Path:
    """Create this user's cache folder in the node's folder for temporary files (TMPDIR).

    Raises:
        UserError: the folder belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"antdist-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(
            "belongs to another user", where=folder, remedy=f"use a folder of your own with {CACHE_KEY}=FOLDER"
        )
    return folder


def open_cache(folder: str | None = None, gigabytes: float = DEFAULT_GB) -> Cache:
    """Open the cache in `folder`, None for the default. Raises UserError."""
    if folder is not None and is_uri(folder):
        raise UserError(
            "the cache must be a folder on each node's own disk",
            where=f"{CACHE_KEY} {folder}",
            remedy="use a local folder",
        )
    return Cache(default_folder() if folder is None else Path(folder).expanduser(), int(gigabytes * GB))


def _try_remove(path: Path) -> bool:
    """Remove a file unless it is in use or being fetched; return whether it is removed."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def _allocate(stream: IO[bytes], size: int) -> None:
    """Allocate disk space for a file and set its size. Raises OSError if the disk is full."""
    try:
        os.posix_fallocate(stream.fileno(), 0, max(size, 1))
    except OSError as error:
        if error.errno in FULL:
            raise
    stream.truncate(size)  # for file systems that cannot allocate


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
