"""Small prepared domains in which every interaction has an item of its own, so that an item names its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from antdist import ragged
from antdist.data.domain import Domain, Sequences, open_domain
from antdist.data.shards import ItemRecord
from antdist.data.writing import write_domain


def numbered_domain(folder: Path, lengths: Sequence[int], *, block_users: int = 4, blocks_per_shard: int = 2) -> Domain:
    """Users with these many interactions; the n-th interaction of the domain is with item n."""
    offsets = ragged.offsets(lengths)
    items = np.arange(offsets[-1])
    write_domain(
        folder,
        folder.name,
        [ItemRecord(i, f"i{i}", None, None, []) for i in items.tolist()],
        Sequences(offsets, items, np.zeros_like(items)),
        [f"u{u}" for u in range(len(lengths))],
        {},
        block_users=block_users,
        blocks_per_shard=blocks_per_shard,
        overwrite=True,
    )
    return open_domain(folder)


def training_targets(lengths: Sequence[int]) -> list[int]:
    """The items that `numbered_domain` has to predict in training: all but each user's first and last two."""
    ends = np.cumsum(lengths)
    return [i for n, end in zip(lengths, ends.tolist(), strict=True) for i in range(end - n + 1, end - 2)]
