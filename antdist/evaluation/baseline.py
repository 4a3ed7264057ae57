"""Popularity: a ranking that ignores the user; every model must beat it."""

from __future__ import annotations

import numpy as np

from antdist.batch import IntArray
from antdist.evaluation.ranking import Queries, Ranks


def rank_by_popularity(popularity: IntArray, queries: Queries) -> Ranks:
    """Rank each user's target by popularity, under the rules of `rank_targets`.

    Args:
        popularity: (N,) how often each item occurs in the training parts, as in a domain's `popularity.npy`.
        queries: of U users.
    """
    size = len(popularity)
    ascending = np.sort(popularity)
    at_least = size - np.searchsorted(ascending, popularity[queries.targets], side="left")  # the target among them
    rows = np.repeat(np.arange(len(queries)), np.diff(queries.exclude_offsets))
    rows, excluded = np.divmod(np.unique(rows * size + queries.exclude_items), size)
    rivals = popularity[excluded] >= popularity[queries.targets[rows]]
    ranks = at_least - np.bincount(rows[rivals], minlength=len(queries))
    seen = queries.seen
    return Ranks(queries.users, np.where(seen, size + 1, ranks), seen)
