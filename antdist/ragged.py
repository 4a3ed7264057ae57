"""Ragged arrays: rows of different lengths laid end to end, described by their offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from antdist.batch import IntArray


def offsets(lengths: Sequence[int] | NDArray[Any]) -> IntArray:
    """Return where each row starts (R + 1,): row i is `values[offsets[i] : offsets[i + 1]]`.

    Args:
        lengths: (R,) integers, the length of each row.
    """
    found = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(np.asarray(lengths, dtype=np.int64), out=found[1:])
    return found


def ranges(begin: IntArray, lengths: IntArray) -> IntArray:
    """Concatenate the integer ranges [begin[i], begin[i] + lengths[i])."""
    starts = offsets(lengths)
    return np.repeat(begin - starts[:-1], lengths) + np.arange(starts[-1])


def slices(values: IntArray, starts: IntArray, ends: IntArray) -> tuple[IntArray, IntArray]:
    """Concatenate the slices `values[starts[i]:ends[i]]` as int64; return them and their offsets."""
    lengths = ends - starts
    return values[ranges(starts, lengths)].astype(np.int64), offsets(lengths)
