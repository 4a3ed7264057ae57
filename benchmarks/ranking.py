"""Full ranking by counting against sorting the masked score matrix: `python benchmarks/ranking.py`.

Random users of a catalogue of the size of Scientific (8,442 users, 4,385 items, d = 256), on 2 threads. Both rankings
start from the same user vectors; the third line adds what encoding the histories takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from antdist.config.schema import ModelConfig
from antdist.data.domain import Sequences
from antdist.evaluation import ranking
from antdist.evaluation.ranking import Queries, rank_targets, unit
from antdist.model.recommender import Recommender, build_recommender


class Ready(nn.Module):
    """User vectors that are there already, one a user: leaves the ranking alone to be timed."""

    def __init__(self, users: Tensor) -> None:
        super().__init__()
        self.users = nn.Parameter(users)

    def encode_users(self, item_rows: Tensor, tokens: Tensor, offsets: Tensor, longest: int) -> Tensor:
        return self.users[tokens]  # a history is one token: the user


def rank_by_sorting(users: Tensor, items: Tensor, queries: Queries) -> np.ndarray:
    """The plain way: all scores, a mask, a sort."""
    scores = unit(users, "users") @ unit(items, "items").T
    rows = np.repeat(np.arange(len(queries)), np.diff(queries.exclude_offsets))
    scores[torch.from_numpy(rows), torch.from_numpy(queries.exclude_items)] = -torch.inf
    order = scores.argsort(dim=1, descending=True)
    return 1 + (order == torch.from_numpy(queries.targets)[:, None]).int().argmax(1).numpy()


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats`, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=8442)
    parser.add_argument("--items", type=int, default=4385)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)

    lengths = 3 + rng.geometric(1 / 4, args.users)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sequences = Sequences(offsets, rng.integers(0, args.items, offsets[-1]), np.arange(offsets[-1]))
    queries = ranking.test_queries(sequences, 50)
    everyone = np.arange(args.users)
    ready = Queries(
        everyone,
        everyone,
        np.arange(args.users + 1),
        queries.targets,
        queries.exclude_items,
        queries.exclude_offsets,
    )
    items, users = torch.randn(args.items, args.dim), torch.randn(args.users, args.dim)
    model = build_recommender(ModelConfig(dim=args.dim, inner=args.dim), {"text": 384})
    vectors = cast("Recommender", Ready(users))

    counted, sorted_ = rank_targets(vectors, items, ready), rank_by_sorting(users, items, ready)
    apart = (counted.ranks - sorted_)[~counted.seen]  # sorting knows no tolerance for ties
    print(
        f"ranks that agree: {(apart == 0).mean():.2%}; counting is above by at most {apart.max()}, below by {-apart.min()}"
    )
    counting = seconds(lambda: rank_targets(vectors, items, ready), args.repeats)
    sorting = seconds(lambda: rank_by_sorting(users, items, ready), args.repeats)
    encoding = seconds(lambda: rank_targets(model, items, queries), args.repeats)
    print(f"counting: {counting:.2f} s\nsorting:  {sorting:.2f} s, {sorting / counting:.1f} times as long")
    print(f"counting, histories encoded by the model: {encoding:.2f} s")


if __name__ == "__main__":
    main()
