"""A bounded cache of remote files on a node's own disk, shared by all processes there: files named by their SHA-256.

FOLDER/
  <digest>           a whole file; what it holds is checked whenever it is opened, for disks err
  <digest>.partial   one that is on its way, at its full size from the start; its fetcher holds it under lock
  lock               held while room is made, so that files in use and on their way never exceed the bound together; it
                     says how many bytes they are, so that the folder is looked through only where some must go

A name says what is in a file, so nothing there can be stale, and domains, runs and ranks share what is equal. Readers hold
what they opened under a shared lock (flock), by which it stays; the rest goes when room is needed, the longest unused first.
Locks end with the process, so what a killed one left in the middle is taken up, or removed, by the next.
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
WAITS = (1.0, 5.0, 15.0)  # seconds between trials to fetch a file
POLL_SECONDS = 0.02  # while another process fetches the same file, or uses what would have to go
FULL_SECONDS = 120.0  # that the cache may be full of files in use
MOST_FETCHES = 10  # of a file that is gone, or damaged, whenever it has been fetched
FULL = (errno.ENOSPC, errno.EDQUOT)
_CACHE_FILE = re.compile(r"[0-9a-f]{64}(\.partial)?")

Source = Callable[[], Generator[bytes, None, None]]


class CorruptDownload(UserError):
    """What was fetched is not what the manifest says; trying again may help."""

    def __init__(self, where: str, what: str) -> None:
        remedy = "compare what lies there with `antdist verify`, and copy it there again"
        super().__init__(f"what was fetched is not the file of the manifest: {what}", where=where, remedy=remedy)


@dataclass(frozen=True)
class Cache:
    """`bound`: the bytes of files that may lie in `folder`."""

    folder: Path
    bound: int

    def open(self, file: File, source: Source, where: str) -> BinaryIO:
        """The file, open for reading, its size and digest checked; from `source` unless it is here. Whoever has it open
        keeps it here; closed, it may go.

        Args:
            source: gives the content in pieces.
            where: of the source, for people.

        Raises:
            Unreachable, CorruptDownload: each time, of so many as `WAITS` allows.
            UserError: there is no such file; it does not fit, or the disk is full.
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
            except FileNotFoundError:  # the folder has just gone
                continue
            except (Unreachable, CorruptDownload) as error:
                if (wait := next(waits, None)) is None:
                    raise
                logger.warning(f"{error} Trying again")
                time.sleep(wait)
            else:
                time.sleep(POLL_SECONDS)
        raise UserError(
            f"what is written there does not stay as it was ({file.name})",
            where=f"{CACHE_KEY} {self.folder}",
            remedy=f"see to its disk, or name a folder on another with {CACHE_KEY}=FOLDER",
        )

    def has(self, file: File) -> bool:
        """Whether the file is here, by its name and size alone."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / file.sha256).stat().st_size == file.bytes
        return False

    def usable_bytes(self) -> int:
        """The bytes that it may hold: the bound, or what the disk has left for it."""
        self._make_folder()
        taken = sum(size for _, size, _ in self._files())
        return min(self.bound, taken + _free_bytes(self.folder))

    def _open_cached(self, file: File) -> BinaryIO | None:
        """The file, if it is here and sound; a damaged one goes."""
        path = self.folder / file.sha256
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(stream, fcntl.LOCK_SH)
            if not os.fstat(stream.fileno()).st_nlink:  # removed, before the lock
                stream.close()
                return None
            now = time.time_ns()
            os.utime(stream.fileno(), ns=(now, now))  # the longest unused go first; the kernel's own stamps are coarse
            if hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256:
                stream.seek(0)
                return stream
        except OSError as error:
            logger.warning(f"{path} cannot be read ({error.strerror})")
        except BaseException:
            stream.close()
            raise
        stream.close()
        logger.warning(f"{path} is damaged ({file.name}): it is fetched again")
        path.unlink(missing_ok=True)
        return None

    @contextlib.contextmanager
    def _lock_partial(self, file: File) -> Iterator[IO[bytes] | None]:
        """The place to fetch a file into, held alone; None where another fetches it, or has just done so."""
        path = self.folder / f"{file.sha256}.partial"
        self._make_folder()
        try:
            stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
        except FileNotFoundError:  # the folder has just gone
            yield None
            return
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if not os.fstat(stream.fileno()).st_nlink:  # removed as a killed one's, before the lock
                yield None
            elif (self.folder / file.sha256).exists():  # it was fetched before the lock
                path.unlink(missing_ok=True)
                yield None
            else:
                yield stream

    def _fetch(self, file: File, partial: IO[bytes], source: Source, where: str) -> None:
        """From `source` to the file's place, whole or not at all."""
        path = self.folder / f"{file.sha256}.partial"
        try:
            self._reserve(file.bytes, partial)
            digest, size = hashlib.sha256(), 0
            with contextlib.closing(source()) as pieces:
                for piece in pieces:
                    size += len(piece)
                    if size > file.bytes:
                        raise CorruptDownload(where, f"it goes on after {file.bytes} bytes")
                    digest.update(piece)
                    partial.write(piece)
            if size != file.bytes:
                raise CorruptDownload(where, f"it ends after {size} of {file.bytes} bytes")
            if digest.hexdigest() != file.sha256:
                raise CorruptDownload(where, "its SHA-256 differs")
            partial.flush()
            with self._lock_folder():  # who looks through the folder meanwhile could miss both names
                path.rename(self.folder / file.sha256)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in FULL:
                raise UserError(
                    f"the disk has no room for {file.bytes / GB:.3g} GB more",
                    where=f"{CACHE_KEY} {self.folder}",
                    remedy=f"free some, or name a folder on another disk with {CACHE_KEY}=FOLDER",
                ) from error
            raise

    # -- room ---------------------------------------------------------------------------------------------------------

    def _reserve(self, size: int, partial: IO[bytes]) -> None:
        """Make `partial` of its full size, once there is room for it.

        Raises:
            UserError: it is larger than the bound; what is in use leaves no room.
            OSError: the disk is full.
        """
        partial.truncate(0)  # what a killed process left
        deadline = time.monotonic() + FULL_SECONDS
        while True:
            with self._lock_folder() as lock:
                told = lock.read()
                taken = int(told) if told.isdigit() else self.bound
                if size <= self.bound and (taken + size > self.bound or size > _free_bytes(self.folder)):
                    taken = self._make_room(size)
                if taken + size <= self.bound:
                    # it may say too much, never too little: what goes in another way is found by a look
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
                    remedy="raise data.cache_gb; `antdist validate` says how much a run needs",
                )
            time.sleep(POLL_SECONDS)

    @contextlib.contextmanager
    def _lock_folder(self) -> Iterator[IO[bytes]]:
        """With the lock, whose file says how many bytes all files have, those on their way included."""
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
        """Remove files, the longest unused first, until `size` bytes fit, or nothing more can go; the bytes that are left."""
        files = sorted(self._files())
        taken, short = sum(found for _, found, _ in files), size - _free_bytes(self.folder)
        for _, found, path in files:
            if taken + size <= self.bound and short <= 0:
                break
            if found and _try_remove(path):
                taken, short = taken - found, short - found
        return taken

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """When each was used last, its bytes, its path. Files of other names are not ours."""
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
                f"the folder cannot be made ({error.strerror})",
                where=f"{CACHE_KEY} {self.folder}",
                remedy="name another",
            ) from None


def default_folder() -> Path:
    """A folder of this user's in the node's folder for temporary files (TMPDIR).

    Raises:
        UserError: another user has made it.
    """
    folder = Path(tempfile.gettempdir()) / f"antdist-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(
            "belongs to another user", where=folder, remedy=f"name a folder of your own with {CACHE_KEY}=FOLDER"
        )
    return folder


def open_cache(folder: str | None = None, gigabytes: float = DEFAULT_GB) -> Cache:
    """The cache in `folder`, None for the default. Raises UserError."""
    if folder is not None and is_uri(folder):
        raise UserError(
            "the cache is a folder on each node's own disk", where=f"{CACHE_KEY} {folder}", remedy="name a folder"
        )
    return Cache(default_folder() if folder is None else Path(folder).expanduser(), int(gigabytes * GB))


def _try_remove(path: Path) -> bool:
    """Remove a file unless somebody uses it, or fetches it; whether it is gone."""
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
    """Give a file its size, and the disk's promise of it. Raises OSError: the disk is full."""
    try:
        os.posix_fallocate(stream.fileno(), 0, max(size, 1))
    except OSError as error:
        if error.errno in FULL:
            raise
    stream.truncate(size)  # where the file system promises nothing, too


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
