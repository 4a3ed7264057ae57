"""The order of training examples as integer arithmetic, without state (docs/architecture.md, law 1).

A *unit* is what is shuffled: a user (`sequence` mode) or a prediction (`prefix` mode). One *pass* over a domain visits
each of its units once: its shards are permuted and distributed over a few canonical streams; a stream reads its shards a
few at a time (a *window*), permutes the blocks of the window, and reads these a few at a time (a *group*), whose units it
permutes. So a reader holds a few shards and reads each once, from front to back.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from antdist import ragged
from antdist.batch import IntArray


def permutation(count: int, *key: int | str) -> IntArray:
    """Permute 0..count-1 as a function of `count` and `key` alone.

    It sorts the raw output of PCG64, which numpy guarantees to be the same in all versions (unlike its `permutation`).
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    raw = np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(count)
    return np.argsort(raw, kind="stable")


def merge_counts(sizes: Sequence[int], first: int) -> tuple[int, ...]:
    """Count how many of the first `first` units of an even merge come from each of several streams.

    Unit j of a stream of n units has virtual time (2j + 1) / 2n, so each stream is spread evenly over the merge; ties go
    to the earlier stream. The result is exact, and computed without iterating over the units before.

    Args:
        sizes: units of each stream.
    """
    total = sum(sizes)
    assert 0 <= first <= total
    # The units before time first / total are off by at most half a unit a stream; the rest is corrected one by one.
    counts = [max(0, -((total - 2 * first * n) // (2 * total))) if n else 0 for n in sizes]
    streams = [s for s, n in enumerate(sizes) if n]
    scale = math.lcm(*(sizes[s] for s in streams))
    tick = {s: scale // sizes[s] for s in streams}
    missing = first - sum(counts)
    for _ in range(missing):
        s = min((s for s in streams if counts[s] < sizes[s]), key=lambda s: ((2 * counts[s] + 1) * tick[s], s))
        counts[s] += 1
    for _ in range(-missing):
        s = max((s for s in streams if counts[s]), key=lambda s: ((2 * counts[s] - 1) * tick[s], s))
        counts[s] -= 1
    return tuple(counts)


def quotas(sizes: Sequence[int], exponent: float) -> tuple[int, ...]:
    """Compute the units of each domain in an epoch: proportional to size ** exponent, `sum(sizes)` in all.

    Each domain gets at least one unit; the remainders are given out by largest fraction.
    """
    if exponent == 1.0:
        return tuple(sizes)
    weights = [float(n) ** exponent for n in sizes]
    spare = sum(sizes) - len(sizes)
    shares = [spare * w / sum(weights) for w in weights]
    counts = [1 + math.floor(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda d: (math.floor(shares[d]) - shares[d], d))
    for d in by_remainder[: sum(sizes) - sum(counts)]:
        counts[d] += 1
    return tuple(counts)


@dataclass(frozen=True)
class Group:
    """Blocks whose units are shuffled together."""

    window: int  # index of the window in its stream
    blocks: tuple[tuple[int, int], ...]  # (shard, block of the shard), as in the manifest
    units: int


@dataclass(frozen=True)
class CanonicalStream:
    """A stream's share of one pass over a domain, in reading order."""

    windows: tuple[tuple[int, ...], ...]  # shards that are open together
    groups: tuple[Group, ...]
    starts: IntArray  # (groups + 1,) the first unit of each group within the stream

    @property
    def units(self) -> int:
        return int(self.starts[-1])


def canonical_streams(
    units: Sequence[Sequence[int]], *, streams: int, window_shards: int, window_blocks: int, key: tuple[int | str, ...]
) -> tuple[CanonicalStream, ...]:
    """Lay out one pass over a domain.

    Args:
        units: `units[shard][block]` counts the units of a block, by the manifest.
        streams: a domain with fewer shards has as many streams as shards.
        window_shards, window_blocks: shards a window, blocks a group.
        key: identifies domain, seed and pass.
    """
    shards = permutation(len(units), *key, "shards").tolist()
    streams = min(streams, len(shards))
    return tuple(
        _canonical_stream(units, shards[s::streams], window_shards, window_blocks, (*key, s)) for s in range(streams)
    )


def _canonical_stream(
    units: Sequence[Sequence[int]],
    shards: Sequence[int],
    window_shards: int,
    window_blocks: int,
    key: tuple[int | str, ...],
) -> CanonicalStream:
    windows = tuple(tuple(shards[i : i + window_shards]) for i in range(0, len(shards), window_shards))
    groups = []
    for w, window in enumerate(windows):
        blocks = [(shard, block) for shard in window for block in range(len(units[shard]))]
        blocks = [blocks[i] for i in permutation(len(blocks), *key, "blocks", w)]
        for i in range(0, len(blocks), window_blocks):
            group = tuple(blocks[i : i + window_blocks])
            groups.append(Group(w, group, sum(units[shard][block] for shard, block in group)))
    return CanonicalStream(windows, tuple(groups), ragged.offsets([g.units for g in groups]))
