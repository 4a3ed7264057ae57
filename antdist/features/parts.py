"""Parts of feature tables as arrays: mapped from a folder, or, where the table lies under a URI, from the node's cache.

A remote part is fetched when its items are first asked for, and stays in the cache for as long as some process has it mapped.
Where a run's tables fit there beside the shards that it shuffles, every part stays mapped; else each rank of the node keeps
its share of the room, the latest used, so that a table may be larger than the disk.
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
    """`map_array` of a file. Raises UserError: as that, and where it cannot be read."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"not an array ({error.strerror})", where=path, remedy=again) from None
    with stream:
        return map_array(stream, path, again)


def map_array(stream: BinaryIO, where: object, again: str) -> NDArray[Any]:
    """A memory-mapped array, read only, of an open `.npy` file, which its map keeps open.

    Raises:
        UserError: not an array, or one of pickled objects.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, columns_first, dtype = read(stream)
        if dtype.hasobject or columns_first:
            raise ValueError(f"of type {dtype}" if dtype.hasobject else "with its columns first")
        # a plain view: numpy's memmap class costs more at each look-up than the look-up itself
        return np.asarray(np.memmap(stream, dtype=dtype, mode="r", offset=stream.tell(), shape=shape))
    except Exception as error:  # numpy's parser of headers raises what it likes
        raise UserError(f"not an array ({str(error).partition('.')[0]})", where=where, remedy=again) from None


def check_array(array: NDArray[Any], shape: Shape, dtype: str, where: object, again: str) -> None:
    """Raises UserError: it is of another shape or type than its table says."""
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise UserError(
            f"an array of shape {array.shape} and type {array.dtype} where the table says {shape} and {dtype}",
            where=where,
            remedy=again,
        )


class MappedParts:
    """The remote parts that this process has mapped, of all tables of a catalogue; the latest used stay, `limit` bytes of
    them, and one in any case. Looked up by the loop and by what reads ahead, so under a lock."""

    def __init__(self) -> None:
        self.limit = 0
        self._maps: OrderedDict[str, NDArray[Any]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __contains__(self, file: File) -> bool:
        return file.sha256 in self._maps

    def array(self, folder: RemotePath, file: File, shape: Shape, dtype: str, again: str) -> NDArray[Any]:
        """A part's rows. Raises UserError: it cannot be fetched, or is no such array."""
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
    """How many of the `needed` bytes of parts this process may keep mapped, where `reserved` of the cache (None: a quarter)
    are for other files: all, if they fit, since the ranks of a node share them; else this rank's share of half of the room,
    as the other half takes what is on its way."""
    room = max(0, cache.bound - (cache.bound // 4 if reserved is None else reserved))
    return needed if needed <= room else room // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
