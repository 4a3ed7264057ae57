"""The arithmetic of the order against sorting, and its guarantees about reading."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antdist.data.stream.order import canonical_streams, merge_counts, permutation, quotas

sizes = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(sum)


@given(sizes)
def test_merge_counts_equal_the_merge_by_virtual_time(sizes):
    units = sorted((Fraction(2 * j + 1, 2 * n), s) for s, n in enumerate(sizes) for j in range(n))
    counts = [0] * len(sizes)
    assert merge_counts(sizes, 0) == tuple(counts)
    for first, (_, stream) in enumerate(units, start=1):
        counts[stream] += 1
        assert merge_counts(sizes, first) == tuple(counts)


def test_merge_counts_are_exact_beyond_floating_point():
    sizes = (10**18 + 1, 10**18 - 1, 3)
    for first in (10**17 + 7, sum(sizes) // 2, sum(sizes) - 1):
        counts = merge_counts(sizes, first)
        assert sum(counts) == first
        last = max(Fraction(2 * c - 1, 2 * n) for c, n in zip(counts, sizes, strict=True) if c)
        following = min(Fraction(2 * c + 1, 2 * n) for c, n in zip(counts, sizes, strict=True) if c < n)
        assert last <= following


def test_permutation_is_fixed_by_its_key():
    assert sorted(permutation(1000, "a", 1).tolist()) == list(range(1000))
    # Written down: another order in a later version would break the resume of runs that are under way.
    assert permutation(8, "domain", 7, 0).tolist() == [6, 3, 4, 0, 5, 7, 2, 1]
    orders = {tuple(permutation(50, *key).tolist()) for key in [("a", 1), ("a", 2), ("b", 1), ("a", "1"), ("a", 1, 0)]}
    assert len(orders) == 5


def test_permutation_is_uniform():
    places = np.array([np.argsort(permutation(4, seed)) for seed in range(4000)])
    for item in range(4):  # where each item lands: 1000 times in each place, standard deviation 27
        assert np.abs(np.bincount(places[:, item]) - 1000).max() < 130


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=6), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_quotas_are_proportional_to_tempered_sizes(sizes, exponent):
    counts = quotas(sizes, exponent)
    assert sum(counts) == sum(sizes) and min(counts) >= 1
    weights = np.array(sizes, float) ** exponent
    expected = weights / weights.sum() * sum(sizes)
    assert np.abs(np.array(counts) - expected).max() <= len(sizes) + 1e-6 * sum(sizes)
    if exponent == 1.0:
        assert list(counts) == sizes


blocks = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=12)


@given(blocks, st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_canonical_streams_read_each_block_once_by_window(units, streams, window_shards, window_blocks):
    plan = canonical_streams(
        units, streams=streams, window_shards=window_shards, window_blocks=window_blocks, key=("d", 0, 0)
    )
    assert len(plan) == min(streams, len(units))
    seen = []
    for stream in plan:
        assert [g.window for g in stream.groups] == sorted(g.window for g in stream.groups)
        assert all(len(window) <= window_shards for window in stream.windows)
        for group, start, end in zip(stream.groups, stream.starts, stream.starts[1:], strict=False):
            assert len(group.blocks) <= window_blocks
            assert {shard for shard, _ in group.blocks} <= set(stream.windows[group.window])
            assert end - start == group.units == sum(units[s][b] for s, b in group.blocks)
            seen += group.blocks
        assert stream.units == stream.starts[-1]
    assert sorted(seen) == [(s, b) for s, shard in enumerate(units) for b in range(len(shard))]


@pytest.mark.parametrize("part", ["shards", "blocks"])
def test_shards_and_blocks_are_permuted_in_each_pass(part):
    def read(number):
        (stream,) = canonical_streams(
            [[1] * 6] * (6 if part == "shards" else 1),
            streams=1,
            window_shards=1,
            window_blocks=2,
            key=("d", 0, number),
        )
        return stream.windows if part == "shards" else [g.blocks for g in stream.groups]

    assert read(0) != read(1) and read(0) == read(0)
