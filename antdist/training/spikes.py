"""Loss spikes: points of the loss curve far above the recent ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

RECENT_POINTS = 50  # points of the curve to compare with
MIN_POINTS = 20  # fewer do not show the usual deviation
THRESHOLD = 10.0  # median absolute deviations above the median
MIN_DEVIATION = 1e-3  # of the median: the least deviation assumed, as a curve without noise has none


def loss_spike(recent: Sequence[float], loss: float) -> float | None:
    """Return a spike's excess over the recent median, in median absolute deviations; else None."""
    if len(recent) < MIN_POINTS:
        return None
    median = statistics.median(recent)
    deviation = max(statistics.median(abs(each - median) for each in recent), MIN_DEVIATION * abs(median))
    excess = (loss - median) / deviation if deviation else 0.0
    return excess if excess > THRESHOLD else None
