"""Memory-mapped parts of feature tables: from a folder, or for remote tables from the node's cache.

A remote part is fetched when its items are first read, and stays in the cache while some process has it mapped. If a run's
tables fit there beside the shards that it shuffles, every part stays mapped; else each rank of the node keeps the most
recently used parts within its share of the cache, so that a table may be larger than the disk.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from antdist.data.cache import Cache
from antdist.data.entries import File
from antdist.data.places import RemotePath
from antdist.errors import UserError

Shape = tuple[int, ...]


def map_file(path: Path, again: str) -> NDArray[Any]:
    """Map an `.npy` file into memory. Raises UserError as `map_array`, or if the file cannot be read."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"is not an array ({error.strerror})", where=path, remedy=again) from None
    with stream:
        return map_array(stream, path, again)


def map_array(stream: BinaryIO, where: object, again: str) -> NDArray[Any]:
    """Map an open `.npy` file into memory, read-only; the map keeps the file open.

    Raises:
        UserError: the file is not an array, or an array of pickled objects.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, columns_first, dtype = read(stream)
        if dtype.hasobject or columns_first:
            raise ValueError(f"type {dtype}" if dtype.hasobject else "column-major order")
        # a plain view: numpy's memmap class costs more at each look-up than the look-up itself
        return np.asarray(np.memmap(stream, dtype=dtype, mode="r", offset=stream.tell(), shape=shape))
    except Exception as error:  # numpy's header parser raises arbitrary exceptions
        raise UserError(f"is not an array ({str(error).partition('.')[0]})", where=where, remedy=again) from None


def check_array(array: NDArray[Any], shape: Shape, dtype: str, where: object, again: str) -> None:
    """Check an array's shape and type against its table. Raises UserError."""
    if array.shape != shape or array.dtype != np.dtype(dtype):
        what = f"the array has shape {array.shape} and type {array.dtype}, expected {shape} and {dtype}"
        raise UserError(what, where=where, remedy=again)


class MappedParts:
    """The remote parts that this process has mapped, of all tables of a catalogue.

    The most recently used parts stay mapped, up to `limit` bytes but at least one part. The training loop and the thread
    that reads ahead both use it, hence the lock.
    """

    def __init__(self) -> None:
        self.limit = 0
        self._maps: OrderedDict[str, NDArray[Any]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __contains__(self, file: File) -> bool:
        return file.sha256 in self._maps

    def array(self, folder: RemotePath, file: File, shape: Shape, dtype: str, again: str) -> NDArray[Any]:
        """Return the rows of a part. Raises UserError if it cannot be fetched or has another shape or type."""
        with self._lock:
            if (found := self._maps.get(file.sha256)) is not None:
                self._maps.move_to_end(file.sha256)
                return found
        with folder.open(file) as stream:
            array = map_array(stream, folder / file.name, again)
        check_array(array, shape, dtype, folder / file.name, again)
        with self._lock:
            if file.sha256 not in self._maps:
                self._maps[file.sha256] = array
                self._bytes += array.nbytes
            while self._bytes > self.limit and len(self._maps) > 1:
                self._bytes -= self._maps.popitem(last=False)[1].nbytes
        return array


def mapping_budget(cache: Cache, needed: int, reserved: int | None = None) -> int:
    """Return how many of the `needed` bytes of remote parts this process may keep mapped.

    All of them, if they fit, since the ranks of a node share them; else this rank's share of half of the cache, as the
    other half takes parts that are being fetched.

    Args:
        reserved: bytes of the cache that are for other files; None: a quarter.
    """
    room = max(0, cache.bound - (cache.bound // 4 if reserved is None else reserved))
    return needed if needed <= room else room // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
