"""From users to windows: which items one causal pass reads, and where in it predictions are made (spec, sections 1 and 5).

A user's training part of n items gives n - 1 predictions: each item but the first, from what came before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from antdist import ragged
from antdist.batch import IntArray


@dataclass(frozen=True)
class PackedWindows:
    """Packed windows (W), their tokens (T) and predictions (P), of a run of units (U); as in `GlobalBatch`."""

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
    """All windows of some users (`sequence` mode): every prediction once, each with as much context as half a window.

    A user's inputs are its training part but the last item. The first window reads the first `max_length` of them and
    predicts at each. Each later window begins `max_length // 2` (at least 1) inputs after the one before and predicts
    only at inputs that no earlier window read. A user with one training item has no window.

    Args:
        items: items of many users, end to end.
        begin, lengths: (U,) where each user's training part lies in `items`.
        users: (U,) their numbers.
    """
    stride = max(1, max_length // 2)
    inputs = lengths - 1
    windows = (inputs > 0) + -(-np.maximum(inputs - max_length, 0) // stride)
    first_window = ragged.offsets(windows)
    unit = np.repeat(np.arange(len(begin)), windows)
    nth = np.arange(len(unit)) - first_window[unit]
    start = nth * stride
    size = np.minimum(inputs[unit] - start, max_length)
    known = np.where(nth > 0, max_length - stride, 0)  # inputs that the window before has read
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
    """One window for each of some predictions (`prefix` mode): the last `max_length` items before the target.

    Args:
        items: items of many users, end to end.
        begin: (U,) where the prediction's user begins in `items`.
        position: (U,) the target's place in the user's sequence, 1 or more.
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
    """The windows of units [first, last) of each piece, end to end, as the array fields of a `GlobalBatch`."""
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
