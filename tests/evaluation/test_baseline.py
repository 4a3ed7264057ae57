"""Popularity against a loop over items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from antdist import ragged
from antdist.data.domain import Sequences
from antdist.data.writing import training_popularity
from antdist.evaluation import ranking
from antdist.evaluation.baseline import rank_by_popularity
from antdist.evaluation.metrics import summary


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 25))
def test_popularity_ranks_equal_a_loop_over_items(seed: int, users: int, items: int) -> None:
    rng = np.random.default_rng(seed)
    offsets = ragged.offsets(rng.integers(3, 12, users))
    sequence = rng.integers(0, items, offsets[-1])
    sequences = Sequences(offsets, sequence, np.arange(len(sequence)))
    popularity = training_popularity(sequences, items)
    queries = ranking.test_queries(sequences, 4)
    got = rank_by_popularity(popularity, queries)
    for user in range(users):
        *history, target = sequence[offsets[user] : offsets[user + 1]].tolist()
        rivals = [i for i in range(items) if i != target and i not in history and popularity[i] >= popularity[target]]
        assert got.seen[user] == (target in history)
        assert got.ranks[user] == (items + 1 if target in history else 1 + len(rivals))


def test_repeated_test_items_in_scientific_match_the_spec(shared_data: Path) -> None:
    """0.6 % of the users have the test item in their history; popularity finds few of the rest."""
    frame = pd.read_csv(shared_data / "scientific" / "interactions.csv.gz")
    frame = frame.sort_values(["user_id", "timestamp"], kind="stable")
    items = frame["item_id"].rank(method="dense").to_numpy().astype(np.int64) - 1
    lengths = frame.groupby("user_id", sort=False).size().to_numpy()
    sequences = Sequences(ragged.offsets(lengths), items, np.arange(len(items)))
    queries = ranking.test_queries(sequences, 50)
    result = summary(rank_by_popularity(training_popularity(sequences, int(items.max()) + 1), queries))
    assert result["users"] == 8442 and round(result["seen"] / 8442, 3) == 0.006
    assert 0.005 < result["Recall@10"] < 0.05
