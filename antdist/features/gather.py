"""Gather rows of memory-mapped arrays into memory, in one pass and in the calling thread alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from antdist.batch import IntArray

if TYPE_CHECKING:
    import torch

TORCH_SERIAL = 32768  # numbers that torch copies in the calling thread (its GRAIN_SIZE)


def take_rows(table: NDArray[Any], indices: IntArray, into: NDArray[Any]) -> None:
    """Assign `into[...] = table[indices]`, widening float16 to float32; each row is read and written once."""
    assert not len(indices) or (indices.min() >= 0 and indices.max() < len(table)), "item index out of range"
    if table.dtype == into.dtype:
        np.take(table, indices, axis=0, out=into, mode="clip")  # the default mode takes a copy, to raise before writing
        return
    # numpy widens one number at a time, torch many
    for some in _row_chunks(into):
        _torch_view(into[some]).copy_(_torch_view(table[indices[some]]))


def round_to_float16(values: NDArray[np.float32]) -> None:
    """Round (n, dim) in place to the nearest float16 values."""
    for some in _row_chunks(values):
        piece = _torch_view(values[some])
        piece.copy_(piece.half())


def _row_chunks(rows: NDArray[Any]) -> Iterator[slice]:
    """Split rows into chunks that fit the CPU cache and that torch copies without threads.

    Threads started here would take the cores of the training step.
    """
    step = max(1, TORCH_SERIAL // max(1, rows.shape[1]))
    return (slice(first, first + step) for first in range(0, len(rows), step))


def _torch_view(array: NDArray[Any]) -> torch.Tensor:
    import torch

    return torch.from_numpy(array)


def group_by_range(ids: IntArray, bounds: IntArray) -> Iterator[tuple[int, slice | IntArray]]:
    """Group `ids` by the range [bounds[k], bounds[k + 1]) that holds them: pairs (k, selector)."""
    if len(ids) == 0:
        return
    if len(bounds) == 2:
        yield 0, slice(0, len(ids))
        return
    if np.all(ids[1:] >= ids[:-1]):
        cuts = np.searchsorted(ids, bounds)
        for k in np.flatnonzero(cuts[1:] > cuts[:-1]):
            yield int(k), slice(int(cuts[k]), int(cuts[k + 1]))
        return
    owner = np.searchsorted(bounds, ids, side="right") - 1
    order = np.argsort(owner, kind="stable")
    cuts = np.searchsorted(owner[order], np.arange(len(bounds)))
    for k in np.flatnonzero(cuts[1:] > cuts[:-1]):
        yield int(k), order[cuts[k] : cuts[k + 1]]
