"""Worlds for benchmarks: histories with the statistics of public data, random features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from antdist import ragged
from antdist.batch import IntArray, ItemInputs
from antdist.data.domain import Domain, Sequences, open_domain
from antdist.data.shards import ItemRecord
from antdist.data.writing import write_domain

PAPER_DIMS = {"text": 768, "image": 1024, "price": 64}  # the authors' features


@dataclass(frozen=True)
class Shape:
    """The size of a world. Lengths are 5 plus a log-normal; item popularity follows Zipf's law."""

    users: int
    items: int
    mean_length: float


TARGET = Shape(8_442, 4_385, 7.0)  # like Amazon Scientific, a target of the paper
LARGE_TARGET = Shape(50_000, 26_000, 7.0)
AUXILIARY = Shape(55_000, 28_800, 14.4)  # like four public domains together


class RandomFeatures:
    """Random features in memory, in place of a domain's tables (`antdist.training.feed.FeatureSource`)."""

    def __init__(self, items: int, dims: dict[str, int], seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.size, self.dims = items, dims
        self.values = {m: torch.randn(items, dim, generator=random) / dim**0.5 for m, dim in dims.items()}

    def features(self, item_ids: IntArray) -> ItemInputs:
        index = torch.from_numpy(np.asarray(item_ids, dtype=np.int64))
        present = torch.ones(len(index), dtype=torch.bool)
        return ItemInputs(
            {m: v.index_select(0, index) for m, v in self.values.items()}, dict.fromkeys(self.values, present), index
        )


def draw_sequences(shape: Shape, seed: int = 0) -> Sequences:
    """Draw histories of random users, each with at least five interactions."""
    random = np.random.default_rng(seed)
    above = random.lognormal(0.0, 1.0, shape.users)
    lengths = 5 + np.floor(above * (shape.mean_length - 4.5) / above.mean()).astype(np.int64)
    offsets = ragged.offsets(lengths)
    chance = 1.0 / (np.arange(shape.items) + 10.0) ** 0.8
    items = random.choice(shape.items, size=int(offsets[-1]), p=chance / chance.sum())
    return Sequences(offsets, items.astype(np.int64), np.arange(offsets[-1]))


def write_world(folder: Path, shape: Shape, seed: int = 0, block_users: int = 1024) -> Domain:
    """Write and open a prepared domain of that shape below `folder`, without features."""
    records = (ItemRecord(i, f"item-{i}", None, None, []) for i in range(shape.items))
    write_domain(
        folder / "world",
        "world",
        records,
        draw_sequences(shape, seed),
        [f"user-{u}" for u in range(shape.users)],
        {},
        block_users=block_users,
    )
    return open_domain(folder / "world")


def padded_prefixes(domain: Domain, length: int, examples: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw predictions of a domain as the usual loader returns them.

    Returns:
        Histories (B, length) padded at the end, their lengths (B,) and the next items (B,).
    """
    known = domain.sequences()
    lengths = np.diff(known.offsets) - 2  # without validation and test item
    random = np.random.default_rng(seed)
    chances: NDArray[np.float64] = (lengths - 1) / (lengths - 1).sum()
    users = random.choice(len(lengths), size=examples, p=chances)
    target = random.integers(1, lengths[users])
    histories, sizes = np.zeros((examples, length), dtype=np.int64), np.minimum(target, length)
    for row, (user, place, size) in enumerate(zip(users, target, sizes, strict=True)):
        end = known.offsets[user] + place
        histories[row, :size] = known.items[end - size : end]
    nexts = known.items[known.offsets[users] + target]
    return torch.from_numpy(histories), torch.from_numpy(sizes), torch.from_numpy(nexts)
