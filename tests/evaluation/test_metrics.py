"""Recall and NDCG against torchmetrics and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antdist.evaluation.metrics import METRICS, ndcg, per_user, recall, summary
from antdist.evaluation.ranking import Ranks


def make_ranks(ranks: list[int], seen: list[bool] | None = None) -> Ranks:
    seen = seen or [False] * len(ranks)
    return Ranks(np.arange(len(ranks)), np.array(ranks, np.int64), np.array(seen))


def test_closed_forms() -> None:
    ranks = np.array([1, 2, 3, 10, 11, 50, 51])
    assert recall(ranks, 10).tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert recall(ranks, 50).tolist() == [1, 1, 1, 1, 1, 1, 0]
    assert ndcg(ranks, 10) == pytest.approx([1, 0.6309297535714575, 0.5, 0.2890648263178879, 0, 0, 0])
    assert ndcg(ranks, 50)[5] == pytest.approx(np.log(2) / np.log(51))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=30), st.sampled_from([1, 5, 10, 50]))
def test_equal_to_torchmetrics(ranks: list[int], k: int) -> None:
    """Scores that put each target at its rank among 70 items, passed to torchmetrics as retrieval queries."""
    from torchmetrics.retrieval import RetrievalNormalizedDCG, RetrievalRecall

    scores = torch.arange(70, 0, -1).float().repeat(len(ranks), 1)
    relevant = torch.zeros_like(scores, dtype=torch.bool)
    relevant[torch.arange(len(ranks)), torch.tensor(ranks) - 1] = True
    index = torch.arange(len(ranks)).repeat_interleave(70)
    for ours, theirs in ((recall, RetrievalRecall(top_k=k)), (ndcg, RetrievalNormalizedDCG(top_k=k))):
        expected = float(theirs(scores.flatten(), relevant.flatten(), indexes=index))
        assert ours(np.array(ranks), k).mean() == pytest.approx(expected, abs=1e-6)


def test_summary_names_counts_and_means() -> None:
    result = summary(make_ranks([1, 20, 100, 101], [False, False, False, True]))
    assert list(result) == ["Recall@10", "Recall@50", "NDCG@10", "NDCG@50", "users", "seen"]
    assert result["Recall@10"] == 0.25 and result["Recall@50"] == 0.5
    assert result["NDCG@50"] == pytest.approx((1 + 1 / np.log2(21)) / 4)
    assert result["users"] == 4 and result["seen"] == 1


@pytest.mark.parametrize("metric", METRICS)
def test_a_seen_target_is_a_miss_in_a_tiny_catalogue(metric: str) -> None:
    """Its rank, catalogue size + 1, would be within k."""
    assert per_user(make_ranks([6, 1], [True, False]), metric).tolist() == [0.0, 1.0]
