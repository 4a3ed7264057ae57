"""Where a prepared domain lies: a folder, or any URI that fsspec reaches, whose files come through the node's cache."""

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
from antdist.io.storage import asking, is_uri, open_storage, patiently

PIECE = 4 << 20  # bytes asked for together
PARALLEL_FETCHES = 8  # files on their way to a process
Kind = TypeVar("Kind", bound=File)


@dataclass(frozen=True)
class RemotePath:
    """A folder or file below a URI; reads like a `Path`, and is for reading alone. Shown without credentials."""

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
        """Raises Unreachable."""
        files, path = self._storage()
        try:
            with asking(str(self)):
                files.invalidate_cache()
                return bool(files.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def read_bytes(self) -> bytes:
        """A small file, past the cache. Raises FileNotFoundError, Unreachable."""

        def read() -> bytes:
            files, path = self._storage()
            with asking(str(self)):
                return bytes(files.cat_file(path))

        return patiently(read, cached.WAITS)

    def read_text(self, encoding: str) -> str:
        """Raises FileNotFoundError, Unreachable."""
        return self.read_bytes().decode(encoding)

    def file_sizes(self) -> dict[str, int | None]:
        """The files in this folder, and how many bytes each has, where the storage tells; none where there is no such folder.
        Raises Unreachable."""

        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in self._list() if entry["type"] == "file"}

    def folder_names(self) -> list[str]:
        """The names of the folders in this one. Raises Unreachable."""
        found = [entry["name"].rstrip("/").rpartition("/")[2] for entry in self._list() if entry["type"] == "directory"]
        return sorted(found)

    def _list(self) -> list[dict[str, Any]]:
        def ask() -> list[dict[str, Any]]:
            files, path = self._storage()
            with asking(str(self)):
                files.invalidate_cache()
                return list(files.ls(path, detail=True))

        try:
            return patiently(ask, cached.WAITS)
        except FileNotFoundError:
            return []

    def open(self, file: File) -> BinaryIO:
        """A file of this folder, from the cache, its digest checked. Raises UserError."""
        there = self / file.name
        return self.cache.open(file, there._read_chunks, str(there))

    def fetch(self, files: Iterable[File]) -> None:
        """Have files of this folder brought to the cache, some side by side. Raises UserError."""
        missing = [file for file in files if not self.cache.has(file)]
        with ThreadPoolExecutor(PARALLEL_FETCHES, thread_name_prefix="fetch") as pool:
            for _ in pool.map(lambda file: self.open(file).close(), missing):
                pass

    def check_sizes(self, files: Iterable[File]) -> None:
        """Raises UserError: one of this folder's files is missing, or of another size."""
        files = list(files)
        there: dict[str, int | None] = {}
        for below in {file.name.rpartition("/")[0] for file in files}:  # what was appended lies in folders of its own
            folder = self / below if below else self
            there |= {f"{below}/{name}".lstrip("/"): size for name, size in folder.file_sizes().items()}
        for file in files:
            if file.name not in there:
                raise UserError("the file is missing", where=self / file.name, remedy=VERIFY_REMEDY)
            size = there[file.name]
            if size not in (file.bytes, None):
                what = f"the file has {size} bytes, {file.bytes} were written"
                raise UserError(what, where=self / file.name, remedy=VERIFY_REMEDY)

    def _read_chunks(self) -> Generator[bytes, None, None]:
        """What the file holds. Raises Unreachable; UserError: there is no such file."""
        files, path = self._storage()
        try:
            with asking(str(self)), files.open(path, "rb", block_size=PIECE) as stream:
                while piece := stream.read(PIECE):
                    yield piece
        except FileNotFoundError:
            raise UserError("the file is missing", where=self, remedy=VERIFY_REMEDY) from None

    def _storage(self) -> tuple[Any, str]:
        return open_storage(self.uri, str(self))


Place = Path | RemotePath


def resolve_place(folder: str | Path, cache: Cache | None = None) -> Place:
    """A folder by its path, or by its URI, with the node's cache (None: the default one) before it. Raises UserError."""
    if not is_uri(folder):
        return Path(folder)
    return RemotePath(str(folder).rstrip("/"), cache or open_cache())


def open_checked(folder: Place, file: File) -> BinaryIO:
    """A file that a manifest vouches for, open for reading, once its size and digest have been found right.

    Raises:
        UserError: naming the file, whatever the damage would have been taken for.
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
        raise UserError("the file is damaged: its SHA-256 is not the manifest's", where=path, remedy=VERIFY_REMEDY)
    return stream


def open_unchecked(folder: Place, file: File) -> BinaryIO:
    """The same, where what is read is checked by other means; only a remote file's digest is looked at.

    Raises:
        UserError: there is no such file.
    """
    if isinstance(folder, RemotePath):
        return folder.open(file)
    try:
        return (folder / file.name).open("rb")
    except OSError as error:
        told = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"the file {told}", where=folder / file.name, remedy=VERIFY_REMEDY) from None


def list_file_names(folder: Place) -> list[str]:
    """Of the files in a folder, sorted; none where there is no such folder. Raises Unreachable."""
    if isinstance(folder, RemotePath):
        return sorted(folder.file_sizes())
    return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def fetch_files(folder: Place, files: Iterable[File]) -> None:
    """Have files brought near that are read soon. Raises UserError."""
    if isinstance(folder, RemotePath):
        folder.fetch(files)


def prefetch(folder: Place, files: Sequence[Kind]) -> Iterator[Kind]:
    """The same files, some of them at a time brought near before they are read one after the other. Raises UserError."""
    for first in range(0, len(files), PARALLEL_FETCHES):
        fetch_files(folder, files[first : first + PARALLEL_FETCHES])
        yield from files[first : first + PARALLEL_FETCHES]
