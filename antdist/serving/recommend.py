"""The top N items for one history: of users we know, of histories typed in, of items that no training saw."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from antdist import ragged
from antdist.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from antdist.data.domain import Domain
    from antdist.model.recommender import Recommender

TOGETHER = 512  # histories ranked at once
_LOOKED_AT = 20_000  # ids compared with an unknown one: difflib takes about 10 microseconds for each


class Named(NamedTuple):
    """What an item is called: its id in the source, and its text if it has any."""

    item_id: str
    text: str | None


def recommend(
    model: Recommender, item_embeddings: Tensor, history: Sequence[int], n: int, *, exclude_history: bool = True
) -> list[tuple[int, float]]:
    """The n items of highest cosine to the user's preference, best first, as (item index, score).

    Every row of `item_embeddings` is ranked, items that nobody has touched too (zero-shot). Fewer than n come back where the
    catalogue has no more.

    Args:
        item_embeddings: (N, d) of the whole catalogue, as `embed_catalogue` gives them.
        history: item indices, oldest first; the model reads the last `max_length` of them, and excludes all.

    Raises:
        UserError: the history is empty, or the model's vectors are not finite.
    """
    from antdist.evaluation.ranking import encode_histories
    from antdist.model.ops.scores import exact_scores, unit_or_fail

    if not history:
        raise UserError("the history is empty", remedy="name at least one item")
    items = np.asarray(history, np.int64)
    assert 0 <= items.min() <= items.max() < len(item_embeddings) and n > 0
    recent = items[-model.config.max_length :]
    vector = unit_or_fail(encode_histories(model, item_embeddings, recent, np.array([0, len(recent)])), "user vectors")
    scores = exact_scores(vector[0], unit_or_fail(item_embeddings, "item embeddings")).cpu().numpy()
    best = np.argsort(-scores, kind="stable")
    if exclude_history:
        best = best[~np.isin(best, items)]
    return [(int(index), float(scores[index])) for index in best[:n]]


def recommend_many(
    model: Recommender,
    item_embeddings: Tensor,
    histories: Sequence[Sequence[int]],
    wanted: Sequence[int],
    *,
    exclude_history: bool = True,
) -> list[list[tuple[int, float]]]:
    """`recommend` for many histories, none of them empty: `wanted[i]` items for the i-th.

    Raises:
        UserError: the model's vectors are not finite.
    """
    from antdist.model.ops.scores import unit_or_fail
    from antdist.serving.top import top_items

    found: list[list[tuple[int, float]]] = []
    for first in range(0, len(histories), TOGETHER):
        whole, numbers = histories[first : first + TOGETHER], wanted[first : first + TOGETHER]
        vectors = unit_or_fail(encode_users(model, item_embeddings, whole), "user vectors")
        seen = np.repeat(np.arange(len(whole)), [len(history) for history in whole]), np.concatenate(whole)
        indices, scores = top_items(vectors, [item_embeddings], max(numbers), seen if exclude_history else None)
        for row, n in enumerate(numbers):
            there = indices[row, :n] >= 0
            found.append(list(zip(indices[row, :n][there].tolist(), scores[row, :n][there].tolist(), strict=True)))
    return found


def encode_users(model: Recommender, item_embeddings: Tensor, histories: Sequence[Sequence[int]]) -> Tensor:
    """Encode histories of item indices, none of them empty, as preferences (len(histories), d).

    The model reads the last `max_length` items of each.
    """
    from antdist.evaluation.ranking import encode_histories

    recent = [history[-model.config.max_length :] for history in histories]
    offsets = ragged.offsets([len(history) for history in recent])
    return encode_histories(model, item_embeddings, np.concatenate(recent), offsets)


def history_of(domain: Domain, user_id: str) -> list[int]:
    """All interactions of a user of the domain, oldest first. UserError with the nearest ids if there is no such user."""
    ids = domain.user_ids()
    if user_id not in ids:
        raise _unknown("user", user_id, ids, "--user", domain.name)
    return domain.histories(np.array([ids.index(user_id)])).items.tolist()


def history_from(domain: Domain, item_ids: Sequence[str]) -> list[int]:
    """The indices of items named by id, oldest first. UserError with the nearest ids if one is unknown."""
    ids = domain.item_ids()
    index = {item_id: i for i, item_id in enumerate(ids)}
    for item_id in item_ids:
        if item_id not in index:
            raise _unknown("item", item_id, ids, "--history", domain.name)
    return [index[item_id] for item_id in item_ids]


def _unknown(kind: str, wanted: str, known: list[str], where: str, domain: str) -> UserError:
    alike = [i for i in known if i[:1] == wanted[:1] and abs(len(i) - len(wanted)) <= 2]
    near = difflib.get_close_matches(wanted, (alike or known)[:_LOOKED_AT])
    remedy = f"did you mean {' or '.join(near)}?" if near else f"ids look like {', '.join(known[:3])}"
    return UserError(f"{domain} has no {kind} {wanted!r}", where=where, remedy=remedy)


def describe(domain: Domain, indices: Sequence[int]) -> list[Named]:
    """What the items at `indices` are called, in that order; reads only the item shards that hold them."""
    wanted, found = set(indices), dict[int, Named]()
    for shard in domain.manifest.item_shards:
        here = wanted & set(range(shard.first, shard.first + shard.items))
        if here:
            records = (record for record in domain.items(shard) if record.index in here)
            found |= {record.index: Named(record.item_id, record.text) for record in records}
    return [found[index] for index in indices]
