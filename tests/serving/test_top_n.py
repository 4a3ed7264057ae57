"""The n best over pieces of a catalogue are the n best of the whole, including ties and exclusions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from antdist.errors import UserError
from antdist.serving import top_n
from antdist.serving.top_n import top_items

DIM = 4


def naive(vectors: np.ndarray, items: np.ndarray, n: int, seen: list[set[int]]) -> list[list[int]]:
    """Sort every score of every user, equal ones by index."""
    scores = vectors @ (items / np.maximum(np.linalg.norm(items, axis=1, keepdims=True), 1e-12)).T
    return [
        [i for i in np.argsort(-row, kind="stable") if i not in out][:n] for row, out in zip(scores, seen, strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_top_items_equals_a_naive_sort_ties_included(data: st.DataObject) -> None:
    """Items are on the axes, in a few lengths, so their cosines are exact and most of them equal."""
    draw = data.draw
    count, users, n = draw(st.integers(1, 90)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    axes = draw(st.lists(st.integers(0, DIM), min_size=count, max_size=count))  # the last stands for a row of zeros
    items = np.eye(DIM + 1, DIM, dtype=np.float32)[axes] * 2.0 ** draw(st.integers(-2, 2))
    weights = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=DIM, max_size=DIM)
    vectors = np.array(draw(st.lists(weights, min_size=users, max_size=users)), np.float32)
    seen = [draw(st.sets(st.integers(0, count - 1))) for _ in range(users)]
    cuts = sorted(draw(st.sets(st.integers(0, count), max_size=3)))
    ranges = [torch.from_numpy(part) for part in np.split(items, cuts)]
    rows = np.repeat(np.arange(users), [len(out) for out in seen])
    left_out = np.array([i for out in seen for i in out], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_n, "PIECE", draw(st.sampled_from([1, 7, 40, 1000])))
        patch.setattr(top_n, "GROUP", draw(st.sampled_from([1, 2, 5])))
        indices, scores = top_items(torch.from_numpy(vectors), ranges, n, (rows, left_out))
    assert indices.shape == scores.shape == (users, min(n, count))
    assert [row[row >= 0].tolist() for row in indices] == naive(vectors, items, n, seen)
    for row, (index, score) in enumerate(zip(indices, scores, strict=True)):
        there = index >= 0
        norms = np.maximum(np.linalg.norm(items[index[there]], axis=1), 1e-12)
        assert np.allclose(score[there], (items[index[there]] @ vectors[row]) / norms)
        assert (score[~there] == -np.inf).all()


def test_ties_take_the_first_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most groups of columns hold some of the highest and some of the second highest scores."""
    monkeypatch.setattr(top_n, "GROUP", 4)
    scores = np.random.default_rng(0).integers(0, 4, (200, 203)).astype(np.float32)
    scores[:100] = np.where(scores[:100] == 3, 2, scores[:100])
    scores[np.arange(100), np.random.default_rng(1).integers(0, 203, 100)] = 3
    for n in (1, 3, 10):
        best, columns = top_n._top_columns(torch.from_numpy(scores), n)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :n]
        np.testing.assert_array_equal(columns.numpy(), order)
        np.testing.assert_array_equal(best.numpy(), np.take_along_axis(scores, order, 1))


def test_scores_of_only_one_piece_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    real = top_n._top_columns

    def watch(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
        widths.append(scores.shape)
        return real(scores, n)

    monkeypatch.setattr(top_n, "_top_columns", watch)
    monkeypatch.setattr(top_n, "PIECE", 64)
    items = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    vectors = torch.nn.functional.normalize(items[:3], dim=1)
    indices, _ = top_items(vectors, items.split(300), 5)
    assert max(widths) == (3, 64) and indices[:, 0].tolist() == [0, 1, 2]


def test_nan_embeddings_are_refused() -> None:
    with pytest.raises(UserError, match="item embeddings contain NaN or Inf"):
        top_items(torch.ones(1, 2), [torch.tensor([[1.0, torch.nan]])], 1)
