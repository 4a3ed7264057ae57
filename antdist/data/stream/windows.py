"""Cut users into windows, each with its predictions (docs/spec/ant.md, sections 1 and 5).

A user's training part of n items gives n - 1 predictions: each item but the first, from the items before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from antdist import ragged
from antdist.batch import IntArray


@dataclass(frozen=True)
class PackedWindows:
    """Packed windows (W), tokens (T) and predictions (P) of consecutive units (U); see `GlobalBatch`."""

    items: IntArray  # (T,)
    offsets: IntArray  # (W + 1,)
    predict_at: IntArray  # (P,)
    targets: IntArray  # (P,)
    users: IntArray  # (W,)
    first_window: IntArray  # (U + 1,) of each unit
    first_prediction: IntArray  # (W + 1,) of each window


def user_windows(
    items: IntArray, begin: IntArray, lengths: IntArray, users: IntArray, max_length: int
) -> PackedWindows:
    """Cut users into windows (`sequence` mode): each prediction once, with half a window of context.

    A user's inputs are its training part without the last item. The first window reads the first `max_length` of them and
    predicts at each. Each later window starts `max_length // 2` (at least 1) inputs after the previous one and predicts
    only at inputs that no earlier window has read. A user with one training item has no window.

    Args:
        items: items of many users, concatenated.
        begin, lengths: (U,) position and length of each user's training part in `items`.
        users: (U,) global user numbers.
    """
    stride = max(1, max_length // 2)
    inputs = lengths - 1
    windows = (inputs > 0) + -(-np.maximum(inputs - max_length, 0) // stride)
    first_window = ragged.offsets(windows)
    unit = np.repeat(np.arange(len(begin)), windows)
    nth = np.arange(len(unit)) - first_window[unit]
    start = nth * stride
    size = np.minimum(inputs[unit] - start, max_length)
    known = np.where(nth > 0, max_length - stride, 0)  # inputs that the previous window has read
    offsets = ragged.offsets(size)
    source = ragged.ranges(begin[unit] + start, size)
    predict_at = ragged.ranges(offsets[:-1] + known, size - known)
    return PackedWindows(
        items=items[source],
        offsets=offsets,
        predict_at=predict_at,
        targets=items[source[predict_at] + 1],
        users=users[unit],
        first_window=first_window,
        first_prediction=ragged.offsets(size - known),
    )


def prefix_windows(
    items: IntArray, begin: IntArray, position: IntArray, users: IntArray, max_length: int
) -> PackedWindows:
    """Make one window a prediction (`prefix` mode): the last `max_length` items before the target.

    Args:
        items: items of many users, concatenated.
        begin: (U,) position of the prediction's user in `items`.
        position: (U,) position of the target in the user's sequence, 1 or more.
        users: (U,) the prediction's user.
    """
    size = np.minimum(position, max_length)
    target = begin + position
    offsets = ragged.offsets(size)
    units = np.arange(len(begin) + 1)
    return PackedWindows(
        items=items[ragged.ranges(target - size, size)],
        offsets=offsets,
        predict_at=offsets[1:] - 1,
        targets=items[target],
        users=users,
        first_window=units,
        first_prediction=units,
    )


def concatenate_windows(pieces: Sequence[tuple[PackedWindows, int, int]]) -> dict[str, IntArray]:
    """Concatenate the windows of units [first, last) of each piece, as fields of a `GlobalBatch`."""
    items, offsets, predict_at, targets, users = [], [np.zeros(1, dtype=np.int64)], [], [], []
    tokens = 0
    for piece, first, last in pieces:
        w0, w1 = piece.first_window[first], piece.first_window[last]
        t0, t1 = piece.offsets[w0], piece.offsets[w1]
        p0, p1 = piece.first_prediction[w0], piece.first_prediction[w1]
        items.append(piece.items[t0:t1])
        offsets.append(piece.offsets[w0 + 1 : w1 + 1] + (tokens - t0))
        predict_at.append(piece.predict_at[p0:p1] + (tokens - t0))
        targets.append(piece.targets[p0:p1])
        users.append(piece.users[w0:w1])
        tokens += int(t1 - t0)
    return {
        "items": np.concatenate(items),
        "offsets": np.concatenate(offsets),
        "predict_at": np.concatenate(predict_at),
        "targets": np.concatenate(targets),
        "users": np.concatenate(users),
    }
