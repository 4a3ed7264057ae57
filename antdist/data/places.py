"""The place of a prepared domain: a folder, or a URI whose files come through the node's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from antdist.data import cache as cached
from antdist.data.cache import Cache, open_cache
from antdist.data.entries import File
from antdist.data.shards import VERIFY_REMEDY
from antdist.errors import UserError, redact
from antdist.io.storage import is_uri, open_storage, retry_unreachable, translate_storage_errors

CHUNK_BYTES = 4 << 20  # of one read from the storage
PARALLEL_FETCHES = 8  # of a process
Kind = TypeVar("Kind", bound=File)


@dataclass(frozen=True)
class RemotePath:
    """A read-only folder or file below a URI, with methods like `Path`; printed without credentials."""

    uri: str
    cache: Cache

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.uri.rstrip('/')}/{name}", self.cache)

    def __str__(self) -> str:
        return redact(self.uri)

    @property
    def name(self) -> str:
        return self.uri.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.uri.rstrip("/").rpartition("/")[0], self.cache)

    def is_file(self) -> bool:
        """Return whether there is such a file. Raises Unreachable."""
        files, path = self._storage()
        try:
            with translate_storage_errors(str(self)):
                files.invalidate_cache()
                return bool(files.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def read_bytes(self) -> bytes:
        """Read a small file, bypassing the cache. Raises FileNotFoundError, Unreachable."""

        def read() -> bytes:
            files, path = self._storage()
            with translate_storage_errors(str(self)):
                return bytes(files.cat_file(path))

        return retry_unreachable(read, cached.WAITS)

    def read_text(self, encoding: str) -> str:
        """Read a small text file, bypassing the cache. Raises FileNotFoundError, Unreachable."""
        return self.read_bytes().decode(encoding)

    def file_sizes(self) -> dict[str, int | None]:
        """Return the files in this folder with their bytes, None where the storage does not report them.

        A folder that does not exist is empty.

        Raises:
            Unreachable: the storage does not answer.
        """
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in self._list() if entry["type"] == "file"}

    def folder_names(self) -> list[str]:
        """Return the sorted names of the folders in this one. Raises Unreachable."""
        found = [entry["name"].rstrip("/").rpartition("/")[2] for entry in self._list() if entry["type"] == "directory"]
        return sorted(found)

    def _list(self) -> list[dict[str, Any]]:
        def ask() -> list[dict[str, Any]]:
            files, path = self._storage()
            with translate_storage_errors(str(self)):
                files.invalidate_cache()
                return list(files.ls(path, detail=True))

        try:
            return retry_unreachable(ask, cached.WAITS)
        except FileNotFoundError:
            return []

    def open(self, file: File) -> BinaryIO:
        """Open a file of this folder from the cache, with its digest checked. Raises UserError."""
        there = self / file.name
        return self.cache.open(file, there._read_chunks, str(there))

    def fetch(self, files: Iterable[File]) -> None:
        """Fetch files of this folder into the cache, several in parallel. Raises UserError."""
        missing = [file for file in files if not self.cache.has(file)]
        with ThreadPoolExecutor(PARALLEL_FETCHES, thread_name_prefix="fetch") as pool:
            for _ in pool.map(lambda file: self.open(file).close(), missing):
                pass

    def check_sizes(self, files: Iterable[File]) -> None:
        """Check that files of this folder exist and have their size. Raises UserError."""
        files = list(files)
        there: dict[str, int | None] = {}
        for below in {file.name.rpartition("/")[0] for file in files}:  # appended files are in subfolders
            folder = self / below if below else self
            there |= {f"{below}/{name}".lstrip("/"): size for name, size in folder.file_sizes().items()}
        for file in files:
            if file.name not in there:
                raise UserError("the file is missing", where=self / file.name, remedy=VERIFY_REMEDY)
            size = there[file.name]
            if size not in (file.bytes, None):
                what = f"the file has {size} bytes, {file.bytes} by the manifest"
                raise UserError(what, where=self / file.name, remedy=VERIFY_REMEDY)

    def _read_chunks(self) -> Generator[bytes, None, None]:
        """Read the file in chunks. Raises Unreachable, or UserError if the file is missing."""
        files, path = self._storage()
        try:
            with translate_storage_errors(str(self)), files.open(path, "rb", block_size=CHUNK_BYTES) as stream:
                while piece := stream.read(CHUNK_BYTES):
                    yield piece
        except FileNotFoundError:
            raise UserError("the file is missing", where=self, remedy=VERIFY_REMEDY) from None

    def _storage(self) -> tuple[Any, str]:
        return open_storage(self.uri, str(self))


Place = Path | RemotePath


def resolve_place(folder: str | Path, cache: Cache | None = None) -> Place:
    """Resolve a path or URI; a URI is read through the cache (None: the node's default). Raises UserError."""
    if not is_uri(folder):
        return Path(folder)
    return RemotePath(str(folder).rstrip("/"), cache or open_cache())


def open_checked(folder: Place, file: File) -> BinaryIO:
    """Open a file of a manifest for reading, after checking its size and digest.

    Raises:
        UserError: the file is missing, unreadable or damaged.
    """
    if isinstance(folder, RemotePath):
        return folder.open(file)
    path = folder / file.name
    try:
        size = path.stat().st_size
        if size != file.bytes:
            raise UserError(
                f"the file has {size} bytes, {file.bytes} by the manifest", where=path, remedy=VERIFY_REMEDY
            )
        stream = path.open("rb")
        try:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
        except BaseException:
            stream.close()
            raise
    except FileNotFoundError:
        raise UserError("the file is missing", where=path, remedy=VERIFY_REMEDY) from None
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror})", where=path, remedy=VERIFY_REMEDY) from None
    if digest != file.sha256:
        stream.close()
        what = "the file is damaged: its SHA-256 differs from the manifest's"
        raise UserError(what, where=path, remedy=VERIFY_REMEDY)
    return stream


def open_unchecked(folder: Place, file: File) -> BinaryIO:
    """Open a file whose content is checked by other means; only remote files have their digest checked.

    Raises:
        UserError: the file is missing or unreadable.
    """
    if isinstance(folder, RemotePath):
        return folder.open(file)
    try:
        return (folder / file.name).open("rb")
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"the file {reason}", where=folder / file.name, remedy=VERIFY_REMEDY) from None


def list_file_names(folder: Place) -> list[str]:
    """List the names of the files in a folder, sorted; a missing folder is empty. Raises Unreachable."""
    if isinstance(folder, RemotePath):
        return sorted(folder.file_sizes())
    return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def fetch_files(folder: Place, files: Iterable[File]) -> None:
    """Fetch the files of a remote folder into the cache. Raises UserError."""
    if isinstance(folder, RemotePath):
        folder.fetch(files)


def prefetch(folder: Place, files: Sequence[Kind]) -> Iterator[Kind]:
    """Give the same files, fetching `PARALLEL_FETCHES` of them at a time ahead. Raises UserError."""
    for first in range(0, len(files), PARALLEL_FETCHES):
        fetch_files(folder, files[first : first + PARALLEL_FETCHES])
        yield from files[first : first + PARALLEL_FETCHES]
