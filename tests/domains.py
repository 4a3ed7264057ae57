"""Small prepared domains in which every interaction has its own item, which names its position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from antdist import ragged
from antdist.data.domain import Domain, Sequences, open_domain
from antdist.data.shards import ItemRecord
from antdist.data.writing import write_domain


def numbered_domain(folder: Path, lengths: Sequence[int], *, block_users: int = 4, blocks_per_shard: int = 2) -> Domain:
    """Write users with these numbers of interactions; the n-th of the domain is with item n."""
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
    """Return the training targets of `numbered_domain`: all but each user's first and last two."""
    ends = np.cumsum(lengths)
    return [i for n, end in zip(lengths, ends.tolist(), strict=True) for i in range(end - n + 1, end - 2)]
