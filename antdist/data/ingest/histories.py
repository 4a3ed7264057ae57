"""From interactions to histories: filter users and items, sort by time, keep the most recent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antdist import ragged
from antdist.batch import IntArray
from antdist.data.domain import Sequences
from antdist.data.ingest.readers.base import Item, Tally
from antdist.data.ingest.sources import Codes
from antdist.data.shards import MIN_INTERACTIONS


def select_interactions(users: Codes, items: Codes, k_core: int | None, tally: Tally) -> IntArray:
    """Select interactions by iterative k-core, or those of users with at least three interactions.

    Args:
        users, items: (T,) codes of each interaction's user and item.
        k_core: fewest interactions of a user (but never fewer than three) and of an item; None: no k-core.

    Returns:
        Positions of the selected interactions, in input order.
    """
    least_user, least_item = (MIN_INTERACTIONS, 0) if k_core is None else (max(k_core, MIN_INTERACTIONS), k_core)
    kept, kept_users, kept_items = np.arange(len(users)), users, items
    while True:
        enough = (np.bincount(kept_users) >= least_user)[kept_users]
        enough &= (np.bincount(kept_items) >= least_item)[kept_items]
        if enough.all():
            break
        kept, kept_users, kept_items = kept[enough], kept_users[enough], kept_items[enough]
    why = "fewer than three interactions" if k_core is None else f"{k_core}-core"
    tally.add(f"users dropped: {why}", _count_distinct(users) - _count_distinct(kept_users))
    tally.add(f"interactions dropped: {why}", len(users) - len(kept))
    return kept


def _count_distinct(codes: Codes) -> int:
    return int(np.count_nonzero(np.bincount(codes)))


def order_interactions(users: Codes, items: Codes, times: NDArray[Any]) -> tuple[Sequences, IntArray]:
    """Sort interactions by user code, then time; equal times keep the input's order.

    Args:
        users, items, times: (T,) of each interaction.

    Returns:
        The sequences of U users, and the code of each user in them, (U,).
    """
    by_user_and_time = np.argsort(times, kind="stable")
    # a user's code in two halves, the lower first: numpy sorts 16 bits by radix, several times as fast as 32
    for half in users.astype("<u4").view("<u2").reshape(-1, 2).T:
        by_user_and_time = by_user_and_time[np.argsort(half[by_user_and_time], kind="stable")]
    lengths = np.bincount(users)
    codes = np.flatnonzero(lengths)
    ordered = items[by_user_and_time].astype(np.int64), times[by_user_and_time].astype(np.int64)
    return Sequences(ragged.offsets(lengths[codes]), *ordered), codes


def truncate_sequences(sequences: Sequences, longest: int, tally: Tally) -> Sequences:
    """Keep the most recent `longest` interactions of every user."""
    to_end = np.repeat(sequences.offsets[1:], sequences.lengths) - np.arange(len(sequences.items))
    recent = to_end <= longest
    tally.add(f"interactions dropped: before a user's most recent {longest}", int((~recent).sum()))
    offsets = ragged.offsets(np.minimum(sequences.lengths, longest))
    return Sequences(offsets, sequences.items[recent], sequences.times[recent])


def drop_untouched_items(
    sequences: Sequences, items: list[Item], k_core: int, tally: Tally
) -> tuple[Sequences, list[Item]]:
    """Keep the items that occur in the sequences, renumbered in their old order."""
    touched = np.bincount(sequences.items, minlength=len(items)) > 0
    renumbered = np.cumsum(touched) - 1
    tally.add(f"items dropped: {k_core}-core", len(items) - int(touched.sum()))
    return replace(sequences, items=renumbered[sequences.items]), [items[place] for place in np.flatnonzero(touched)]
