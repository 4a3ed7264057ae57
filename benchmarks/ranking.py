"""Full ranking by counting against sorting the masked score matrix.

Random users and items of the size of Amazon Scientific. Both sides start from the same user and item vectors, score all
items for all users, exclude what a user has seen, and return the rank of the target: by counting the items above it
(`antdist.evaluation.ranking.rank_targets`), or by `torch.argsort` of the whole masked matrix. A last line has the model
encode the users' histories too.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from antdist.config.schema import ModelConfig
from antdist.evaluation.ranking import Queries, rank_targets, test_queries
from antdist.model.ops.scores import scores, unit_or_fail
from antdist.model.recommender import Recommender, build_recommender
from benchmarks.report import Line, Options, Report, alternate, ratio
from benchmarks.worlds import TARGET, Shape, draw_sequences

DIM = 256


class FixedUsers(nn.Module):
    """Precomputed user vectors in place of an encoder, so that only the ranking is timed."""

    def __init__(self, users: Tensor) -> None:
        super().__init__()
        self.users = nn.Parameter(users)

    def encode_users(self, item_rows: Tensor, tokens: Tensor, offsets: Tensor, longest: int) -> Tensor:
        return self.users[tokens]  # a history is one token: the user


def rank_by_sorting(users: Tensor, items: Tensor, queries: Queries) -> np.ndarray:
    """Rank the plain way: all scores, a mask, a sort."""
    found = scores(unit_or_fail(users, "users"), unit_or_fail(items, "items"))
    rows = np.repeat(np.arange(len(queries)), np.diff(queries.exclude_offsets))
    found[torch.from_numpy(rows), torch.from_numpy(queries.exclude_items)] = -torch.inf
    order = found.argsort(dim=1, descending=True)
    return 1 + (order == torch.from_numpy(queries.targets)[:, None]).int().argmax(1).numpy()


def run(options: Options) -> Report:
    shape = Shape(500, 300, 7.0) if options.short else TARGET
    torch.manual_seed(0)
    queries = test_queries(draw_sequences(shape), 50)
    everyone = np.arange(shape.users)
    ready = Queries(
        everyone,
        everyone,
        np.arange(shape.users + 1),
        queries.targets,
        queries.exclude_items,
        queries.exclude_offsets,
    )
    items, users = torch.randn(shape.items, DIM), torch.randn(shape.users, DIM)
    model = build_recommender(ModelConfig(dim=DIM, inner=DIM, modalities=["text"]), {"text": 384})
    vectors = cast("Recommender", FixedUsers(users))

    counted, in_order = rank_targets(vectors, items, ready), rank_by_sorting(users, items, ready)
    apart = (counted.ranks - in_order)[~counted.seen]  # sorting knows no tolerance for ties

    def by_counting() -> None:
        rank_targets(vectors, items, ready)

    def by_sorting() -> None:
        rank_by_sorting(users, items, ready)

    def with_histories() -> None:
        rank_targets(model, items, queries)

    seconds = alternate({"counting": by_counting, "sorting": by_sorting, "encoding": with_histories}, options.repeats)
    return Report(
        "ranking",
        f"rank of one target among {shape.items:,} items for each of {shape.users:,} users, d = {DIM}, scoring and leaving "
        "out seen items included: rank_targets (counting) against torch.argsort of the masked score matrix, same vectors",
        [
            Line("counting", seconds["counting"], "s"),
            Line("sorting", seconds["sorting"], "s"),
            ratio("counting is faster", seconds["sorting"], seconds["counting"]),
            Line("counting, the model encodes the histories first", seconds["encoding"], "s"),
        ],
        [f"ranks that agree: {(apart == 0).mean():.2%}, none further apart than {abs(apart).max()} (ties by rounding)"],
    )
