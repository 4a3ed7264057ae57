"""The top N items for one or many histories, exactly, over a catalogue scored a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from antdist import ragged
from antdist.batch import IntArray
from antdist.errors import UserError
from antdist.evaluation.ranking import encode_histories
from antdist.model.ops.scores import exact_scores, unit_or_fail
from antdist.model.recommender import Recommender

HISTORY_BATCH = 512  # histories encoded and ranked together
# Items scored together: as many as keep the scores of a batch of users in a processor's cache; on a GPU, 128 MiB.
PIECE, GPU_PIECE = 8192, 65536
GROUP = 64  # columns of scores searched together, groups with the highest maxima first


def recommend(
    model: Recommender, item_embeddings: Tensor, history: Sequence[int], n: int, *, exclude_history: bool = True
) -> list[tuple[int, float]]:
    """Return the n items of highest cosine to the user's preference, best first, as (item index, score).

    Every row of `item_embeddings` is ranked, including items without interactions (zero-shot).

    Args:
        item_embeddings: (N, d) of the whole catalogue, from `embed_catalogue`.
        history: item indices, oldest first; the model reads the last `max_length` of them, all are excluded.

    Returns:
        Fewer than n items if the catalogue has no more.

    Raises:
        UserError: the history is empty, or the model's vectors are NaN or Inf.
    """
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
    counts: Sequence[int],
    *,
    exclude_history: bool = True,
) -> list[list[tuple[int, float]]]:
    """Return what `recommend` returns for many non-empty histories: `counts[i]` items for the i-th.

    Raises:
        UserError: the model's vectors are NaN or Inf.
    """
    found: list[list[tuple[int, float]]] = []
    for first in range(0, len(histories), HISTORY_BATCH):
        batch, numbers = histories[first : first + HISTORY_BATCH], counts[first : first + HISTORY_BATCH]
        vectors = unit_or_fail(encode_users(model, item_embeddings, batch), "user vectors")
        seen = np.repeat(np.arange(len(batch)), [len(history) for history in batch]), np.concatenate(batch)
        indices, scores = top_items(vectors, [item_embeddings], max(numbers), seen if exclude_history else None)
        for row, n in enumerate(numbers):
            is_item = indices[row, :n] >= 0
            pairs = zip(indices[row, :n][is_item].tolist(), scores[row, :n][is_item].tolist(), strict=True)
            found.append(list(pairs))
    return found


def encode_users(model: Recommender, item_embeddings: Tensor, histories: Sequence[Sequence[int]]) -> Tensor:
    """Encode non-empty histories of item indices as preferences (len(histories), d).

    The model reads the last `max_length` items of each.
    """
    recent = [history[-model.config.max_length :] for history in histories]
    offsets = ragged.offsets([len(history) for history in recent])
    return encode_histories(model, item_embeddings, np.concatenate(recent), offsets)


def top_items(
    vectors: Tensor, catalogue: Iterable[Tensor], n: int, seen: tuple[IntArray, IntArray] | None = None
) -> tuple[IntArray, NDArray[np.float32]]:
    """Return the n items of highest cosine to each user, best first, ties in the catalogue's order.

    At most users x `PIECE` scores exist at a time.

    Args:
        vectors: (U, d), rows of length 1.
        catalogue: ranges (N_k, d) of the item embeddings, in order, not normalised; on the vectors' device.
        seen: (row, item) pairs to exclude; an item may occur twice.

    Returns:
        Item indices and scores, (U, min(n, N)). Rows of users with fewer items left end in -1 and -infinity.

    Raises:
        UserError: an embedding is NaN or Inf.
    """
    assert n > 0
    users, items = seen if seen is not None else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    order = np.argsort(items, kind="stable")
    users, items = users[order], items[order]
    device, first = vectors.device, 0
    scores = torch.empty(len(vectors), 0, device=device)
    indices = torch.empty(len(vectors), 0, dtype=torch.int64, device=device)
    for piece in _split(catalogue, PIECE if device.type == "cpu" else GPU_PIECE):
        piece_scores = exact_scores(vectors, unit_or_fail(piece, "item embeddings"))
        here = slice(*np.searchsorted(items, [first, first + len(piece)]).tolist())
        rows, columns = torch.from_numpy(users[here]), torch.from_numpy(items[here] - first)
        piece_scores[rows.to(device), columns.to(device)] = -torch.inf
        best, column = _top_columns(piece_scores, n)
        # Earlier pieces come first and the sort is stable, so equal scores keep the catalogue's order.
        scores, kept = torch.cat([scores, best], 1).sort(dim=1, descending=True, stable=True)
        scores, kept = scores[:, :n], kept[:, :n]
        indices = torch.cat([indices, column + first], 1).gather(1, kept)
        first += len(piece)
    indices[scores == -torch.inf] = -1
    return indices.cpu().numpy(), scores.cpu().numpy()


def _split(catalogue: Iterable[Tensor], size: int) -> Iterable[Tensor]:
    return (piece for part in catalogue for piece in part.split(size))


def _top_columns(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the n highest of each row (U, C), highest first, and their columns; ties by column.

    The n highest lie in the n groups of columns with the highest maxima (of equal groups the first): any other group is
    preceded by n groups that each hold a score at least as high. Only these are searched, and maxima are cheap.
    """
    groups = scores.shape[1] // GROUP
    if groups <= 2 * n:
        return _search(scores, n)
    grouped_columns = groups * GROUP
    grouped = scores[:, :grouped_columns].unflatten(1, (groups, GROUP))
    chosen = _search(grouped.amax(2), n)[1].sort(1).values
    columns = (chosen.unsqueeze(2) * GROUP + torch.arange(GROUP, device=scores.device)).flatten(1)
    rest = torch.arange(grouped_columns, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns, rest], 1)
    best, place = _search(scores.gather(1, columns), n)
    return best, columns.gather(1, place)


def _search(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    if n >= scores.shape[1]:
        return scores.sort(dim=1, descending=True, stable=True)
    # topk returns any of equal scores. One more than needed shows whether the last has an equal that was cut off.
    best, columns = scores.topk(n + 1, 1)
    is_cut = best[:, n - 1] == best[:, n]
    columns, order = columns[:, :n].sort(1)
    best, again = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, again)
    if bool(is_cut.any()):
        stable = scores[is_cut].sort(dim=1, descending=True, stable=True)
        best[is_cut], columns[is_cut] = stable.values[:, :n], stable.indices[:, :n]
    return best, columns
