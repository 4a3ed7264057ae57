"""Ragged arrays: rows of different lengths laid end to end, described by their offsets."""

from __future__ import annotations

import numpy as np

from antdist.batch import IntArray


def starts_of(lengths: IntArray) -> IntArray:
    """Where runs of these lengths begin when laid end to end; one longer than `lengths`, with the end last."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def ranges(begin: IntArray, lengths: IntArray) -> IntArray:
    """begin[0], begin[0] + 1, ... (lengths[0] of them), then begin[1], ...: all runs end to end."""
    starts = starts_of(lengths)
    return np.repeat(begin - starts[:-1], lengths) + np.arange(starts[-1])
