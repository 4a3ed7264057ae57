"""Shard a global batch over ranks: whole windows, balanced tokens, equal items and candidates (law 2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from antdist import ragged
from antdist.batch import Batch, GlobalBatch, IntArray

FloatArray = NDArray[np.float64]

# Catalogue items per id of a micro-batch above which ids are sorted instead of marked (sorting 65,000 takes 1 ms).
SPARSE = 32


def assign_windows(lengths: IntArray, parts: int) -> IntArray:
    """Assign windows to parts, (W,): longest first, in snake order (0, 1, ..., 1, 0, 0, 1, ...).

    If W >= parts, every part gets a window, and the tokens of two parts differ by at most the longest window.

    Args:
        lengths: (W,) tokens of each window.
    """
    rank = np.empty(len(lengths), dtype=np.int64)
    rank[np.argsort(-lengths, kind="stable")] = np.arange(len(lengths))
    row, column = np.divmod(rank, parts)
    return np.where(row % 2 == 0, column, parts - 1 - column)


def select_windows(batch: GlobalBatch, windows: IntArray) -> GlobalBatch:
    """Select windows of a batch, by increasing index, with their predictions; the selection may be empty."""
    begin = batch.offsets[windows]
    lengths = batch.offsets[windows + 1] - begin
    offsets = ragged.offsets(lengths)
    bounds = np.searchsorted(batch.predict_at, batch.offsets)
    counts = bounds[windows + 1] - bounds[windows]
    predictions = ragged.ranges(bounds[windows], counts)
    return GlobalBatch(
        epoch=batch.epoch,
        index=batch.index,
        items=batch.items[ragged.ranges(begin, lengths)],
        offsets=offsets,
        predict_at=batch.predict_at[predictions] + np.repeat(offsets[:-1] - begin, counts),
        targets=batch.targets[predictions],
        users=batch.users[windows],
    )


def split_batch(batch: GlobalBatch, parts: int) -> list[GlobalBatch]:
    """Split a batch into micro-batches of whole windows in order, with balanced tokens; some may be empty."""
    if parts == 1:
        return [batch]
    part = assign_windows(np.diff(batch.offsets), parts)
    return [select_windows(batch, np.flatnonzero(part == p)) for p in range(parts)]


def shard_batch(
    batch: GlobalBatch,
    *,
    rank: int,
    world_size: int,
    candidates: Literal["in_batch", "catalogue", "sampled"],
    catalogue_size: int,
    samples: int = 0,
    log_q: bool = False,
    cumulative_counts: IntArray | None = None,
    seed: int = 0,
    step: int = 0,
) -> Batch:
    """Take this rank's share of a global (micro-)batch; everything but the share is equal on every rank.

    Let n_c be how often item c is a next item in the global batch, m_c how often it was drawn, and
    q_c = (popularity_c + 1) / sum(popularity + 1). Candidates and the biases of their logits are

    - `in_batch`: the distinct next items. bias = log n_c, so that the logsumexp over distinct candidates equals that over
      all other predictions' next items; with `log_q` bias = log n_c - log q_c and target_bias = -log q_c.
    - `catalogue`: all items, no bias.
    - `sampled`: the distinct next items and the distinct of `samples` draws with replacement, from q with `log_q`, else
      uniform. bias = log m_c, minus log(samples q_c) with `log_q`; -inf for an item that was not drawn (a candidate of
      its own predictions only); target_bias = -log(samples q_c) with `log_q`, else none.

    Args:
        cumulative_counts: (catalogue_size + 1,) cumulative sum, from 0, of popularity + 1; used with `log_q` only.
        seed, step: of the draws of `sampled`; give each micro-batch its own step.
    """
    assert not log_q or cumulative_counts is not None or candidates == "catalogue"
    cumulative_counts = cumulative_counts if log_q else None
    batch, item_ids, chosen, counts, bias, target_bias = _choose_candidates(
        batch, candidates, catalogue_size, samples, cumulative_counts, seed, step
    )
    mine = select_windows(batch, np.flatnonzero(assign_windows(np.diff(batch.offsets), world_size) == rank))
    position = np.empty(len(item_ids), dtype=np.int64)  # of a row among the candidates
    position[chosen] = np.arange(len(chosen))
    begin, end = partition_rows(len(item_ids), rank, world_size)
    own_begin, own_end = np.searchsorted(chosen, [begin, end]).tolist()
    return Batch(
        item_ids=torch.from_numpy(item_ids),
        share=(begin, end),
        tokens=torch.from_numpy(mine.items),
        offsets=torch.from_numpy(mine.offsets),
        predict_at=torch.from_numpy(mine.predict_at),
        targets=torch.from_numpy(position[mine.targets]),
        candidates=torch.from_numpy(chosen),
        own=(own_begin, own_end),
        counts=torch.from_numpy(counts.astype(np.float32)),
        bias=None if bias is None else torch.from_numpy(bias.astype(np.float32)),
        target_bias=None if target_bias is None else torch.from_numpy(target_bias.astype(np.float32)),
        predictions=batch.predictions,
        longest=int(np.diff(mine.offsets).max(initial=0)),
    )


def _choose_candidates(
    batch: GlobalBatch,
    candidates: str,
    catalogue_size: int,
    samples: int,
    cumulative_counts: IntArray | None,
    seed: int,
    step: int,
) -> tuple[GlobalBatch, IntArray, IntArray, IntArray, FloatArray | None, FloatArray | None]:
    """Choose the candidates of a batch; see `shard_batch`.

    Returns:
        The batch with items and targets as rows of `item_ids`; the distinct `item_ids` (N,); the rows of the candidates
        (C,), how often each is a target, and the biases.
    """
    if candidates == "catalogue":
        item_ids = np.arange(catalogue_size)
        return batch, item_ids, item_ids, np.bincount(batch.targets, minlength=catalogue_size), None, None
    draws = np.empty(0, dtype=np.int64)
    if candidates == "sampled":
        draws = _draw_samples(samples, catalogue_size, cumulative_counts, seed, step)
    item_ids, (items, targets, draws) = _renumber(catalogue_size, batch.items, batch.targets, draws)
    chosen, counts, drawn = _count_candidates(targets, draws, len(item_ids))
    repeats = drawn if candidates == "sampled" else counts
    biases = _compute_biases(repeats, item_ids[chosen], cumulative_counts, samples=max(1, len(draws)))
    return replace(batch, items=items, targets=targets), item_ids, chosen, counts, *biases


def partition_rows(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return this rank's range [begin, end) of rows; the first ranks get one more if there is a remainder."""
    each, over = divmod(rows, world_size)
    begin = rank * each + min(rank, over)
    return begin, begin + each + (rank < over)


def _renumber(catalogue_size: int, *ids: IntArray) -> tuple[IntArray, list[IntArray]]:
    """Return the distinct ids, sorted, and each array with its ids replaced by their positions among them.

    Ids are found by marking items of the catalogue; if it is many times larger than the batch, by sorting.
    """
    together = np.concatenate(ids)
    if catalogue_size > SPARSE * len(together):
        distinct, places = np.unique(together, return_inverse=True)
    else:
        seen = np.zeros(catalogue_size, dtype=np.bool_)
        seen[together] = True
        distinct = np.flatnonzero(seen)
        place = np.empty(catalogue_size, dtype=np.int64)  # only the entries of distinct ids are set and read
        place[distinct] = np.arange(len(distinct))
        places = place[together]
    return distinct, np.split(places, np.cumsum([len(some) for some in ids])[:-1])


def _count_candidates(targets: IntArray, draws: IntArray, rows: int) -> tuple[IntArray, IntArray, IntArray]:
    """Return the rows that are targets or drawn, and how often each is a target and is drawn."""
    counts, drawn = np.bincount(targets, minlength=rows), np.bincount(draws, minlength=rows)
    chosen = np.flatnonzero(counts + drawn)
    return chosen, counts[chosen], drawn[chosen]


def _draw_samples(
    samples: int, catalogue_size: int, cumulative_counts: IntArray | None, seed: int, step: int
) -> IntArray:
    random = np.random.default_rng([seed, step])
    if cumulative_counts is None:
        return random.integers(catalogue_size, size=samples)
    return np.searchsorted(cumulative_counts[1:], random.integers(cumulative_counts[-1], size=samples), side="right")


def _compute_biases(
    repeats: IntArray, ids: IntArray, cumulative_counts: IntArray | None, samples: int
) -> tuple[FloatArray, FloatArray | None]:
    with np.errstate(divide="ignore"):  # log 0 = -inf is intended: an item that was not drawn is no negative
        bias = np.log(repeats.astype(np.float64))
    if cumulative_counts is None:
        return bias, None
    # Counts are popularity + 1, so that no probability is 0.
    chance = (cumulative_counts[ids + 1] - cumulative_counts[ids]) / cumulative_counts[-1]
    correction = np.log(samples * chance)
    return bias - correction, -correction
