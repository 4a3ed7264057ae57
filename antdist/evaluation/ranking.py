"""Full ranking of a catalogue by cosine, by counting: nothing is sorted, no users x items mask is built (spec, section 7)."""

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
    from antdist.features.table import Catalogue
    from antdist.model.recommender import Recommender

# Scores closer than this are the same score. Matrix products of other shapes round a float32 cosine differently
# (1e-7), so without it an item with the very features of the target would tie or not by how the work was cut.
TIE = 1e-6

RANGE_ITEMS = 1 << 20  # items of a large catalogue that are embedded together: a gigabyte of vectors


@dataclass(frozen=True)
class Queries:
    """What is asked of U users: their history, the item that came next, and the items left out of the ranking.

    Items are indices into the rows of the embeddings that are ranked: a domain's own item indices.
    """

    users: IntArray  # (U,) user index in the domain, each once
    items: IntArray  # (T,) histories, oldest first, one user after the other; at most max_length a user
    offsets: IntArray  # (U + 1,)
    targets: IntArray  # (U,)
    exclude_items: IntArray  # (E,) all of a user's history, uncut; an item may stand there twice
    exclude_offsets: IntArray  # (U + 1,)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def seen(self) -> NDArray[np.bool_]:
        """(U,) whether the target stands in the user's history already: a miss by definition."""
        again = self.exclude_items == np.repeat(self.targets, np.diff(self.exclude_offsets))
        rows = np.repeat(np.arange(len(self)), np.diff(self.exclude_offsets))
        return np.bincount(rows[again], minlength=len(self)) > 0

    def select(self, rows: IntArray) -> Queries:
        """The queries at `rows`, in that order."""
        items, offsets = ragged.slices(self.items, self.offsets[rows], self.offsets[rows + 1])
        exclude = ragged.slices(self.exclude_items, self.exclude_offsets[rows], self.exclude_offsets[rows + 1])
        return Queries(self.users[rows], items, offsets, self.targets[rows], *exclude)

    def shard(self, rank: int, world_size: int) -> Queries:
        """This rank's share: every world_size-th user. `merge` puts the ranks of all shares together again."""
        return self.select(np.arange(rank, len(self), world_size))


@dataclass(frozen=True)
class Ranks:
    """Where each user's target came: 1 is the top. A target seen before is a miss, at catalogue size + 1."""

    users: IntArray  # (U,) as in the queries
    ranks: IntArray  # (U,)
    seen: NDArray[np.bool_]  # (U,)


def merge(shares: Sequence[Ranks]) -> Ranks:
    """The ranks of all shares, by increasing user."""
    users, ranks, seen = (np.concatenate([getattr(s, name) for s in shares]) for name in ("users", "ranks", "seen"))
    order = np.argsort(users)
    return Ranks(users[order], ranks[order], seen[order])


def validation_queries(sequences: Sequences, max_length: int, *, limit: int | None = None, seed: int = 0) -> Queries:
    """From each user's training part to the second last item. `limit`: at most so many users, drawn by `seed`."""
    return _queries(sequences, max_length, 2, limit, seed)


def test_queries(sequences: Sequences, max_length: int, *, limit: int | None = None, seed: int = 0) -> Queries:
    """From each user's training part and validation item to the last item. `limit` as in `validation_queries`."""
    return _queries(sequences, max_length, 1, limit, seed)


def drawn_users(count: int, limit: int | None, seed: int) -> IntArray:
    """Which of `count` users are asked, by increasing index: all, or `limit` of them, drawn by `seed`."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def _queries(sequences: Sequences, max_length: int, from_end: int, limit: int | None, seed: int) -> Queries:
    users = drawn_users(len(sequences.offsets) - 1, limit, seed)
    starts, ends = sequences.offsets[users], sequences.offsets[users + 1] - from_end
    assert (ends > starts).all(), "a prepared user has at least three interactions"
    items, offsets = ragged.slices(sequences.items, np.maximum(starts, ends - max_length), ends)
    exclude = ragged.slices(sequences.items, starts, ends)
    return Queries(users, items, offsets, sequences.items[ends].astype(np.int64), *exclude)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in (parts may be frozen)."""
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
    """Item embeddings (N, d), not normalised, of all items or of `item_ids`; no gradient, on the model's device.

    Raises:
        UserError: the model has a learned embedding for each item of another catalogue (ANT_t), so it cannot rank this.
    """
    if model.item_embeddings is not None and model.catalogue_size != catalogue.size:
        raise UserError(
            f"the model has learned embeddings for {model.catalogue_size} items (ANT_t), the catalogue has "
            f"{catalogue.size}: it cannot rank items that it was not trained with",
            remedy="use a model without item_embeddings for new items, or re-learn on this catalogue",
        )
    ids = np.arange(catalogue.size) if item_ids is None else item_ids
    device = next(model.parameters()).device
    with evaluating(model):
        parts = [
            model.embed_items(catalogue.features(ids[first : first + chunk]).to(device)).item
            for first in range(0, len(ids), chunk)
        ]
    return torch.cat(parts)


def encode_histories(model: Recommender, item_embeddings: Tensor, items: IntArray, offsets: IntArray) -> Tensor:
    """The preference vector (U, d) of each history: the output at its last item (spec, section 4)."""
    device = item_embeddings.device
    bounds = torch.from_numpy(offsets).to(device)
    with evaluating(model):
        tokens = torch.from_numpy(items).to(device)
        states: Tensor = model.encode_users(item_embeddings, tokens, bounds, int(np.diff(offsets).max()))
        return states[bounds[1:] - 1]


def rank_targets(
    model: Recommender, item_embeddings: Tensor, queries: Queries, *, chunk_users: int = 512, chunk_items: int = 4096
) -> Ranks:
    """Rank each user's target among all items that are not in the user's history, by cosine (spec, section 7).

    rank = 1 + number of other candidates whose score is not below the target's: ties count against the model.
    Holds chunk_users x chunk_items scores at a time.

    Args:
        item_embeddings: (N, d) of the whole catalogue, as `embed_catalogue` gives them.

    Raises:
        UserError: an embedding or a user's vector is not finite.
    """
    size = len(item_embeddings)
    assert not len(queries) or max(int(queries.targets.max()), int(queries.exclude_items.max())) < size
    ranks = np.empty(len(queries), np.int64)
    by_length = np.argsort(np.diff(queries.offsets), kind="stable")
    catalogue = unit_or_fail(item_embeddings, "item embeddings")
    for first in range(0, len(queries), chunk_users):
        rows = by_length[first : first + chunk_users]
        asked = queries.select(rows)
        vectors = unit_or_fail(encode_histories(model, item_embeddings, asked.items, asked.offsets), "user vectors")
        targets = catalogue[torch.from_numpy(asked.targets).to(catalogue.device)]
        ranks[rows] = 1 + _rivals(vectors, targets, catalogue, asked, chunk_items).cpu().numpy()
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
    """`rank_targets` among the `size` items of a catalogue from global id `first` on, which are embedded here: where they
    are many, `range_items` at a time, so that a catalogue of any size is ranked.

    Raises:
        UserError: as `embed_catalogue` and `rank_targets`.
    """
    if size <= range_items or not len(queries):
        embeddings = embed_catalogue(model, catalogue, np.arange(first, first + min(size, range_items)))
        return rank_targets(model, embeddings, queries, chunk_users=chunk_users, chunk_items=chunk_items)
    named, places = np.unique(np.concatenate([queries.items, queries.targets]), return_inverse=True)
    known = embed_catalogue(model, catalogue, first + named)
    items, targets = places[: len(queries.items)], torch.from_numpy(places[len(queries.items) :]).to(known.device)
    by_length = np.argsort(np.diff(queries.offsets), kind="stable")
    groups = []
    for begin in range(0, len(queries), chunk_users):
        rows = by_length[begin : begin + chunk_users]
        asked = queries.select(rows)
        read = replace(queries, items=items).select(rows)
        vectors = unit_or_fail(encode_histories(model, known, read.items, read.offsets), "user vectors")
        groups.append((rows, asked, vectors, unit_or_fail(known[targets[torch.from_numpy(rows)]], "item embeddings")))
    ranks = np.ones(len(queries), np.int64)
    for start in range(0, size, range_items):
        ids = np.arange(first + start, first + min(start + range_items, size))
        some = unit_or_fail(embed_catalogue(model, catalogue, ids), "item embeddings")
        for rows, asked, vectors, wanted in groups:
            ranks[rows] += _rivals(vectors, wanted, some, asked, chunk_items, start).cpu().numpy()
    return Ranks(queries.users, np.where(queries.seen, size + 1, ranks), queries.seen)


def _rivals(
    vectors: Tensor, targets: Tensor, catalogue: Tensor, queries: Queries, chunk: int, begin: int = 0
) -> Tensor:
    """(U,) how many candidates other than the target score at least as high as it, of the items from `begin` on whose
    embeddings `catalogue` (N, d) are. `targets` (U, d) are those of the targets."""
    device = vectors.device
    rows, items = _no_candidates(queries)
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


def _no_candidates(queries: Queries) -> tuple[IntArray, IntArray]:
    """(row, item) pairs that do not compete: each user's history and the target itself; by increasing item."""
    users = np.arange(len(queries))
    rows = np.concatenate([users, np.repeat(users, np.diff(queries.exclude_offsets))])
    items = np.concatenate([queries.targets, queries.exclude_items])
    order = np.argsort(items, kind="stable")
    return rows[order], items[order]
