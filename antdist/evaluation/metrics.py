"""Recall and NDCG of full rankings with one relevant item per user (docs/spec/ant.md, section 7)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from antdist.batch import IntArray
from antdist.evaluation.ranking import Ranks

FloatArray = NDArray[np.float64]

METRICS = ("Recall@10", "Recall@50", "NDCG@10", "NDCG@50")


def recall(ranks: IntArray, k: int) -> FloatArray:
    """Return 1 where the target is among the top k, else 0; same shape as `ranks`."""
    return (ranks <= k).astype(np.float64)


def ndcg(ranks: IntArray, k: int) -> FloatArray:
    """Return 1 / log2(rank + 1) where the target is among the top k, else 0; same shape as `ranks`."""
    return np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)


def per_user(ranks: Ranks, metric: str) -> FloatArray:
    """Compute a metric such as "NDCG@10" for each user (U,).

    A target that is in the history is a miss, even in a catalogue of fewer than k items, where its rank is within k.
    """
    name, k = metric.split("@")
    return np.where(ranks.seen, 0.0, {"Recall": recall, "NDCG": ndcg}[name](ranks.ranks, int(k)))


def summary(ranks: Ranks) -> dict[str, float]:
    """Average `METRICS` over users; count `users`, and those whose target is in the history (`seen`)."""
    assert len(ranks.ranks), "no users to average over"
    means = {metric: float(per_user(ranks, metric).mean()) for metric in METRICS}
    return means | {"users": len(ranks.ranks), "seen": int(ranks.seen.sum())}
