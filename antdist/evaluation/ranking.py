"""Full ranking of a catalogue by cosine (docs/spec/ant.md, section 7).

A rank is counted, not sorted for: one plus the items that score at least as high as the target. Users x items scores exist
for a chunk of both only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from antdist import ragged
from antdist.batch import IntArray
from antdist.errors import UserError
from antdist.model.ops.products import exact_products
from antdist.model.ops.scores import exact_scores, unit_or_fail

if TYPE_CHECKING:
    from antdist.data.domain import Sequences
    from antdist.features.catalogue import Catalogue
    from antdist.model.recommender import Recommender

# Scores closer than this are equal. A float32 cosine depends on the shape of the matrix product by about 1e-7, so without
# a tolerance it would depend on the chunks whether an item with the target's features ties with it.
TIE = 1e-6

RANGE_ITEMS = 1 << 20  # items of a large catalogue that are embedded together: 1 GiB of vectors at d = 256


@dataclass(frozen=True)
class Queries:
    """Of U users the history, the item that came next, and the items that are excluded from the ranking.

    Items are rows of the embeddings that are ranked: a domain's item indices.
    """

    users: IntArray  # (U,) user index in the domain, each once
    items: IntArray  # (T,) histories, oldest first, one user after the other; at most max_length a user
    offsets: IntArray  # (U + 1,)
    targets: IntArray  # (U,)
    exclude_items: IntArray  # (E,) each user's complete history; an item may occur twice
    exclude_offsets: IntArray  # (U + 1,)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def seen(self) -> NDArray[np.bool_]:
        """(U,) whether the target is in the user's history already: a miss by definition."""
        again = self.exclude_items == np.repeat(self.targets, np.diff(self.exclude_offsets))
        rows = np.repeat(np.arange(len(self)), np.diff(self.exclude_offsets))
        return np.bincount(rows[again], minlength=len(self)) > 0

    def select(self, rows: IntArray) -> Queries:
        """Return the queries at `rows`, in that order."""
        items, offsets = ragged.slices(self.items, self.offsets[rows], self.offsets[rows + 1])
        exclude = ragged.slices(self.exclude_items, self.exclude_offsets[rows], self.exclude_offsets[rows + 1])
        return Queries(self.users[rows], items, offsets, self.targets[rows], *exclude)

    def shard(self, rank: int, world_size: int) -> Queries:
        """Return this process's share, every `world_size`-th user; `merge` joins the ranks of all shares."""
        return self.select(np.arange(rank, len(self), world_size))


@dataclass(frozen=True)
class Ranks:
    """Ranks of the users' targets: 1 is the top, catalogue size + 1 a target in the history."""

    users: IntArray  # (U,) as in the queries
    ranks: IntArray  # (U,)
    seen: NDArray[np.bool_]  # (U,)


def merge(shares: Sequence[Ranks]) -> Ranks:
    """Join the ranks of all shares, by increasing user."""
    users, ranks, seen = (np.concatenate([getattr(s, name) for s in shares]) for name in ("users", "ranks", "seen"))
    order = np.argsort(users)
    return Ranks(users[order], ranks[order], seen[order])


def validation_queries(sequences: Sequences, max_length: int, *, limit: int | None = None, seed: int = 0) -> Queries:
    """Query the second last item of each user, given the items before it.

    Args:
        sequences: of a domain.
        max_length: the history is cut to so many last items.
        limit: number of users, drawn by `seed`; None: all.
        seed: of the draw.
    """
    return _queries(sequences, max_length, 2, limit, seed)


def test_queries(sequences: Sequences, max_length: int, *, limit: int | None = None, seed: int = 0) -> Queries:
    """Query the last item of each user, given the items before it. Arguments as of `validation_queries`."""
    return _queries(sequences, max_length, 1, limit, seed)


def draw_users(count: int, limit: int | None, seed: int) -> IntArray:
    """Draw `limit` of `count` users (None: all of them), by increasing index."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def _queries(sequences: Sequences, max_length: int, from_end: int, limit: int | None, seed: int) -> Queries:
    users = draw_users(len(sequences.offsets) - 1, limit, seed)
    starts, ends = sequences.offsets[users], sequences.offsets[users + 1] - from_end
    assert (ends > starts).all(), "a prepared user has at least three interactions"
    items, offsets = ragged.slices(sequences.items, np.maximum(starts, ends - max_length), ends)
    exclude = ragged.slices(sequences.items, starts, ends)
    return Queries(users, items, offsets, sequences.items[ends].astype(np.int64), *exclude)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation without gradients, with exact products; then restore each module's mode."""
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), exact_products(device):
            yield
    finally:
        for module, training in modes:
            module.training = training


def embed_catalogue(
    model: Recommender, catalogue: Catalogue, item_ids: IntArray | None = None, chunk: int = 4096
) -> Tensor:
    """Embed all items or `item_ids`: (N, d), not of unit length, without gradient, on the model's device.

    Raises:
        UserError: the model has learned embeddings (ANT_t) for a catalogue of another size, so it cannot rank this one.
    """
    if model.item_embeddings is not None and model.catalogue_size != catalogue.size:
        raise UserError(
            f"the model has learned embeddings for {model.catalogue_size} items (ANT_t), the catalogue has "
            f"{catalogue.size}; it can only rank the items that it was trained on",
            remedy="use a model without item_embeddings for new items, or re-learn on this catalogue",
        )
    ids = np.arange(catalogue.size) if item_ids is None else item_ids
    device = next(model.parameters()).device
    with evaluation_mode(model):
        parts = [
            model.embed_items(catalogue.features(ids[first : first + chunk]).to(device)).item
            for first in range(0, len(ids), chunk)
        ]
    return torch.cat(parts)


def encode_histories(model: Recommender, item_embeddings: Tensor, items: IntArray, offsets: IntArray) -> Tensor:
    """Compute each history's preference vector (U, d): the state at its last item."""
    device = item_embeddings.device
    bounds = torch.from_numpy(offsets).to(device)
    with evaluation_mode(model):
        tokens = torch.from_numpy(items).to(device)
        states: Tensor = model.encode_users(item_embeddings, tokens, bounds, int(np.diff(offsets).max()))
        return states[bounds[1:] - 1]


def rank_targets(
    model: Recommender, item_embeddings: Tensor, queries: Queries, *, chunk_users: int = 512, chunk_items: int = 4096
) -> Ranks:
    """Rank each user's target among all items that are not in the user's history, by cosine.

    rank = 1 + number of other candidates whose score is not below the target's: ties count against the model.

    Args:
        model: encodes the histories.
        item_embeddings: (N, d) of the complete catalogue, from `embed_catalogue`.
        queries: of U users.
        chunk_users: users that are scored together.
        chunk_items: items that are scored together.

    Raises:
        UserError: NaN or Inf in the item embeddings or user vectors.
    """
    size = len(item_embeddings)
    assert not len(queries) or max(int(queries.targets.max()), int(queries.exclude_items.max())) < size
    ranks = np.empty(len(queries), np.int64)
    by_length = np.argsort(np.diff(queries.offsets), kind="stable")
    catalogue = unit_or_fail(item_embeddings, "item embeddings")
    for first in range(0, len(queries), chunk_users):
        rows = by_length[first : first + chunk_users]
        chosen = queries.select(rows)
        vectors = unit_or_fail(encode_histories(model, item_embeddings, chosen.items, chosen.offsets), "user vectors")
        targets = catalogue[torch.from_numpy(chosen.targets).to(catalogue.device)]
        ranks[rows] = 1 + _count_rivals(vectors, targets, catalogue, chosen, chunk_items).cpu().numpy()
    seen = queries.seen
    return Ranks(queries.users, np.where(seen, size + 1, ranks), seen)


def rank_in_ranges(
    model: Recommender,
    catalogue: Catalogue,
    first: int,
    size: int,
    queries: Queries,
    *,
    range_items: int = RANGE_ITEMS,
    chunk_users: int = 512,
    chunk_items: int = 4096,
) -> Ranks:
    """Embed a run of a catalogue's items, range by range, and rank targets among all of them.

    Args:
        model: embeds the items and encodes the histories.
        catalogue: of one or several domains.
        first: global id of the run's first item.
        size: items of the run.
        queries: of U users; their items count from `first`.
        range_items: items that are embedded together; no more than these embeddings and those of the items that the
            queries name are in memory.
        chunk_users: as of `rank_targets`.
        chunk_items: as of `rank_targets`.

    Raises:
        UserError: as of `embed_catalogue` and `rank_targets`.
    """
    if size <= range_items or not len(queries):
        embeddings = embed_catalogue(model, catalogue, np.arange(first, first + min(size, range_items)))
        return rank_targets(model, embeddings, queries, chunk_users=chunk_users, chunk_items=chunk_items)
    named, rows_of = np.unique(np.concatenate([queries.items, queries.targets]), return_inverse=True)
    known = embed_catalogue(model, catalogue, first + named)
    items, targets = rows_of[: len(queries.items)], torch.from_numpy(rows_of[len(queries.items) :]).to(known.device)
    by_length = np.argsort(np.diff(queries.offsets), kind="stable")
    groups = []
    for begin in range(0, len(queries), chunk_users):
        rows = by_length[begin : begin + chunk_users]
        chosen = queries.select(rows)
        read = replace(queries, items=items).select(rows)
        vectors = unit_or_fail(encode_histories(model, known, read.items, read.offsets), "user vectors")
        groups.append((rows, chosen, vectors, unit_or_fail(known[targets[torch.from_numpy(rows)]], "item embeddings")))
    ranks = np.ones(len(queries), np.int64)
    for start in range(0, size, range_items):
        ids = np.arange(first + start, first + min(start + range_items, size))
        units = unit_or_fail(embed_catalogue(model, catalogue, ids), "item embeddings")
        for rows, chosen, vectors, wanted in groups:
            ranks[rows] += _count_rivals(vectors, wanted, units, chosen, chunk_items, start).cpu().numpy()
    return Ranks(queries.users, np.where(queries.seen, size + 1, ranks), queries.seen)


def _count_rivals(
    vectors: Tensor, targets: Tensor, catalogue: Tensor, queries: Queries, chunk: int, begin: int = 0
) -> Tensor:
    """Count for each user (U,) the candidates other than the target that score at least as high as it.

    Args:
        vectors: (U, d) unit vectors of the users.
        targets: (U, d) unit vectors of their targets.
        catalogue: (N, d) unit vectors of the items from index `begin` on.
        queries: of these users.
        chunk: items that are scored together.
        begin: index of the catalogue's first item in the queries' numbering.
    """
    device = vectors.device
    rows, items = _excluded_pairs(queries)
    bounds = np.searchsorted(items, begin + np.minimum(np.arange(0, len(catalogue) + chunk, chunk), len(catalogue)))
    row, item = torch.from_numpy(rows).to(device), torch.from_numpy(items).to(device)
    count = torch.zeros(len(vectors), dtype=torch.int64, device=device)
    threshold = (vectors * targets).sum(1, keepdim=True) - TIE
    for number, first in enumerate(range(0, len(catalogue), chunk)):
        scores = exact_scores(vectors, catalogue[first : first + chunk])
        here = slice(*bounds[number : number + 2].tolist())
        scores[row[here], item[here] - begin - first] = -torch.inf
        count += (scores >= threshold).count_nonzero(1)
    return count


def _excluded_pairs(queries: Queries) -> tuple[IntArray, IntArray]:
    """List the (row, item) pairs that do not compete, each user's history and target, by increasing item."""
    users = np.arange(len(queries))
    rows = np.concatenate([users, np.repeat(users, np.diff(queries.exclude_offsets))])
    items = np.concatenate([queries.targets, queries.exclude_items])
    order = np.argsort(items, kind="stable")
    return rows[order], items[order]
