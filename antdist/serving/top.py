"""The best items of each user over a catalogue of any size, exactly: scored a piece at a time, the best so far kept."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from antdist.batch import IntArray
from antdist.model.ops.scores import exact_scores, unit_or_fail

# Items that are scored together: as many as keep the scores of 512 users in a processor's cache; on a GPU, 128 MiB.
PIECE, GPU_PIECE = 8192, 65536
GROUP = 64  # items looked at by the highest of their scores first


def top_items(
    vectors: Tensor, catalogue: Iterable[Tensor], n: int, seen: tuple[IntArray, IntArray] | None = None
) -> tuple[IntArray, NDArray[np.float32]]:
    """The n items of highest cosine to each user, best first; items of the very same score in the catalogue's order.

    No more than users x `PIECE` scores exist at a time.

    Args:
        vectors: (U, d), rows of length 1.
        catalogue: ranges (N_k, d) of the item embeddings, in order, not normalised; on the vectors' device.
        seen: (row, item) pairs that are left out; an item may stand there twice.

    Returns:
        Item indices and scores, (U, min(n, N)). Where a user has fewer items left, -1 and -infinity fill the row up.

    Raises:
        UserError: an embedding is not finite.
    """
    assert n > 0
    users, items = seen if seen is not None else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    order = np.argsort(items, kind="stable")
    users, items = users[order], items[order]
    device, first = vectors.device, 0
    scores = torch.empty(len(vectors), 0, device=device)
    indices = torch.empty(len(vectors), 0, dtype=torch.int64, device=device)
    for piece in _pieces(catalogue, PIECE if device.type == "cpu" else GPU_PIECE):
        of_piece = exact_scores(vectors, unit_or_fail(piece, "item embeddings"))
        here = slice(*np.searchsorted(items, [first, first + len(piece)]).tolist())
        rows, columns = torch.from_numpy(users[here]), torch.from_numpy(items[here] - first)
        of_piece[rows.to(device), columns.to(device)] = -torch.inf
        best, column = _top(of_piece, n)
        # what was found before comes first, and the sort is stable: equal scores stay in the catalogue's order
        scores, kept = torch.cat([scores, best], 1).sort(dim=1, descending=True, stable=True)
        scores, kept = scores[:, :n], kept[:, :n]
        indices = torch.cat([indices, column + first], 1).gather(1, kept)
        first += len(piece)
    indices[scores == -torch.inf] = -1
    return indices.cpu().numpy(), scores.cpu().numpy()


def _pieces(catalogue: Iterable[Tensor], size: int) -> Iterable[Tensor]:
    return (piece for part in catalogue for piece in part.split(size))


def _top(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n highest of each row (U, C), highest first, and their columns; equal ones by increasing column.

    The n highest lie in the n groups of columns with the highest maxima, of equal groups the first: only these are
    searched, and the maxima are cheap.
    """
    groups = scores.shape[1] // GROUP
    if groups <= 2 * n:
        return _search(scores, n)
    whole = groups * GROUP
    grouped = scores[:, :whole].unflatten(1, (groups, GROUP))
    chosen = _search(grouped.amax(2), n)[1].sort(1).values
    columns = (chosen.unsqueeze(2) * GROUP + torch.arange(GROUP, device=scores.device)).flatten(1)
    rest = torch.arange(whole, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns, rest], 1)
    best, place = _search(scores.gather(1, columns), n)
    return best, columns.gather(1, place)


def _search(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    if n >= scores.shape[1]:
        return scores.sort(dim=1, descending=True, stable=True)
    # topk takes any of equal ones. One more than asked for shows whether the last has an equal that was left out
    best, columns = scores.topk(n + 1, 1)
    cut = best[:, n - 1] == best[:, n]
    columns, order = columns[:, :n].sort(1)
    best, again = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, again)
    if bool(cut.any()):
        stable = scores[cut].sort(dim=1, descending=True, stable=True)
        best[cut], columns[cut] = stable.values[:, :n], stable.indices[:, :n]
    return best, columns
