"""A few items and users, and the batches that the stream would make of them, written out."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from antdist.batch import Batch, ItemInputs
from antdist.model.recommender import Recommender

DIMS = {"text": 7, "image": 6, "price": 4}
Window = tuple[list[int], list[int], list[int]]  # items, positions that predict, next items
Result = TypeVar("Result")


class SmallWorld:
    """`size` items with random features, about a third of each modality missing."""

    def __init__(self, size: int = 15, seed: int = 0, missing: float = 0.3) -> None:
        random = torch.Generator().manual_seed(seed)
        self.size = size
        self.present = {m: torch.rand(size, generator=random) >= missing for m in DIMS}
        self.values = {
            m: torch.randn(size, dim, generator=random) * self.present[m].unsqueeze(1) for m, dim in DIMS.items()
        }

    def rows(self, items: Tensor) -> ItemInputs:
        return ItemInputs(
            {m: v[items] for m, v in self.values.items()}, {m: p[items] for m, p in self.present.items()}, items
        )


def windows(sequences: Sequence[Sequence[int]], mode: str, length: int) -> list[Window]:
    """`prefix`: a window per prefix that predicts at its end; `sequence`: one per user, at each token."""
    if mode == "sequence":
        assert all(len(s) <= length + 1 for s in sequences)
        return [(list(s[:-1]), list(range(len(s) - 1)), list(s[1:])) for s in sequences]
    return [
        (list(s[max(0, n - length) : n]), [min(n, length) - 1], [s[n]]) for s in sequences for n in range(1, len(s))
    ]


def make_batch(
    sharded: Sequence[Sequence[Window]],
    rank: int,
    candidates: str,
    size: int,
    drawn: Sequence[int] = (),
    expected: Tensor | None = None,
) -> Batch:
    """Make the batch of `rank`, where `sharded[r]` are the windows of rank r."""
    everything = [window for part in sharded for window in part]
    following = Counter(target for _, _, targets in everything for target in targets)
    used = {item for items, _, _ in everything for item in items} | set(following) | set(drawn)
    item_ids = list(range(size)) if candidates == "catalogue" else sorted(used)
    chosen = {"catalogue": item_ids, "in_batch": sorted(following), "sampled": sorted(set(following) | set(drawn))}
    bias = target_bias = None
    if candidates == "in_batch":
        bias = torch.tensor([math.log(following[item]) for item in chosen[candidates]])
    if candidates == "sampled":
        copies = Counter(drawn)
        bias = torch.tensor([math.log(copies[i]) if i in copies else -math.inf for i in chosen[candidates]])
        if expected is not None:
            target_bias = -expected[torch.tensor(chosen[candidates])].log()
            bias = bias + target_bias
    starts, tokens, predict_at, targets = [0], [], [], []
    for items, at, nexts in sharded[rank]:
        tokens += [item_ids.index(item) for item in items]
        predict_at += [starts[-1] + position for position in at]
        targets += [chosen[candidates].index(target) for target in nexts]
        starts.append(starts[-1] + len(items))
    ranks = len(sharded)
    share = (len(item_ids) * rank // ranks, len(item_ids) * (rank + 1) // ranks)
    rows = [item_ids.index(item) for item in chosen[candidates]]
    return Batch(
        item_ids=torch.tensor(item_ids),
        share=share,
        tokens=torch.tensor(tokens, dtype=torch.int64),
        offsets=torch.tensor(starts),
        predict_at=torch.tensor(predict_at, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        candidates=torch.tensor(rows),
        own=(sum(row < share[0] for row in rows), sum(row < share[1] for row in rows)),
        counts=torch.tensor([float(following[item]) for item in chosen[candidates]]),
        bias=bias,
        target_bias=target_bias,
        predictions=sum(following.values()),
        longest=max((len(items) for items, _, _ in sharded[rank]), default=0),
    )


def local_rows(world: SmallWorld, batch: Batch) -> ItemInputs:
    return world.rows(batch.item_ids[slice(*batch.share)])


def on_ranks(ranks: int, run: Callable[[int, Callable[[Tensor], Tensor]], Result]) -> list[Result]:
    """Call `run(rank, gather)` on threads; gather gives each rank the rows of all, with gradient."""
    barrier, rows = threading.Barrier(ranks, timeout=30), {}

    def gather_of(rank: int) -> Callable[[Tensor], Tensor]:
        def gather(local: Tensor) -> Tensor:
            rows[rank] = local
            barrier.wait()
            return torch.cat([rows[r] for r in range(ranks)])

        return gather

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: run(rank, gather_of(rank)), range(ranks)))


def randomise(model: Recommender, seed: int = 0) -> Recommender:
    """Weights far from their initial values, so that shifts, biases and routing all matter."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm.weight" in name else 0.0
            parameter.copy_(offset + 0.4 * torch.randn(parameter.shape, generator=random))
    return model
