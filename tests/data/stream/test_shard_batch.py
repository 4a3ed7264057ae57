"""Sharding a batch against plain Python: whose windows, which items and candidates, with which biases."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from antdist import ragged
from antdist.batch import GlobalBatch
from antdist.data.stream.shard_batch import assign_windows, partition_rows, shard_batch, split_batch

CATALOGUE = 60


def random_batch(seed, windows, longest=12, catalogue=CATALOGUE):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, windows)
    offsets = ragged.offsets(lengths)
    at = [i for b, e in itertools.pairwise(offsets) for i in range(random.integers(b, e), e)]
    return GlobalBatch(
        epoch=1,
        index=2,
        items=random.integers(0, catalogue, offsets[-1]),
        offsets=offsets,
        predict_at=np.array(at, dtype=np.int64),
        targets=random.integers(0, catalogue, len(at)),
        users=np.arange(windows),
    )


def windows_of(items, offsets, predict_at, targets):
    """[(items, {position: target})] of each window."""
    unpacked = []
    for begin, end in itertools.pairwise(offsets):
        made = {int(p - begin): int(t) for p, t in zip(predict_at, targets, strict=True) if begin <= p < end}
        unpacked.append((tuple(int(i) for i in items[begin:end]), made))
    return unpacked


def as_ids(batch):
    """Return the windows of a rank's batch in item ids."""
    ids = batch.item_ids.numpy()
    return windows_of(
        ids[batch.tokens.numpy()],
        batch.offsets.numpy(),
        batch.predict_at.numpy(),
        ids[batch.candidates.numpy()[batch.targets.numpy()]],
    )


def shard_all(batch, world_size, candidates="in_batch", **settings):
    return [
        shard_batch(batch, rank=r, world_size=world_size, candidates=candidates, catalogue_size=CATALOGUE, **settings)
        for r in range(world_size)
    ]


@given(
    st.integers(0, 1000), st.integers(0, 12), st.integers(1, 5), st.sampled_from(["in_batch", "catalogue", "sampled"])
)
def test_shares_add_up_to_the_batch(seed, windows, world_size, candidates):
    batch = random_batch(seed, windows)
    shares = shard_all(batch, world_size, candidates, samples=7)
    expected = windows_of(batch.items, batch.offsets, batch.predict_at, batch.targets)
    assert sorted(map(repr, expected)) == sorted(repr(w) for shard in shares for w in as_ids(shard))
    rows = [row for shard in shares for row in range(*shard.share)]
    assert rows == list(range(len(shares[0].item_ids)))
    for shard in shares:
        for name in ("item_ids", "candidates", "counts", "bias"):
            if getattr(shard, name) is not None:
                assert torch.equal(getattr(shard, name), getattr(shares[0], name))
        own = [row for row in shard.candidates.tolist() if shard.share[0] <= row < shard.share[1]]
        assert shard.candidates[slice(*shard.own)].tolist() == own
        assert shard.predictions == batch.predictions
        assert shard.longest == max((len(items) for items, _ in as_ids(shard)), default=0)
        if windows >= world_size:
            assert len(shard.targets) > 0


def test_dtypes_and_empty_shares():
    full, empty = sorted(shard_all(random_batch(0, 1), 2), key=lambda shard: -len(shard.tokens))
    assert len(full.tokens) > 0 == len(empty.tokens) == len(empty.targets) and empty.offsets.tolist() == [0]
    for shard in (full, empty):
        for name in ("item_ids", "tokens", "offsets", "predict_at", "targets", "candidates"):
            assert getattr(shard, name).dtype == torch.int64
        assert shard.counts.dtype == shard.bias.dtype == torch.float32


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 6))
def test_parts_differ_by_at_most_the_longest_window(seed, windows, parts):
    lengths = np.minimum(np.random.default_rng(seed).zipf(1.5, windows), 50)
    tokens = np.bincount(assign_windows(lengths, parts), weights=lengths, minlength=parts)
    assert tokens.max() - tokens.min() <= lengths.max()


def test_assignment_favours_no_part():
    lengths = np.arange(1, 101)
    assert np.bincount(assign_windows(lengths, 2), weights=lengths).tolist() == [2525, 2525]


def test_tokens_are_balanced_on_skewed_lengths():
    lengths = np.minimum(np.random.default_rng(0).zipf(1.5, 400), 50)
    tokens = np.bincount(assign_windows(lengths, 4), weights=lengths)
    assert tokens.max() / tokens.mean() < 1.02
    naive = np.bincount(np.arange(400) * 4 // 400, weights=lengths)
    assert naive.max() / naive.mean() > 1.05


@given(st.integers(0, 1000), st.integers(1, 15), st.integers(1, 4))
def test_split_keeps_windows_whole_and_in_order(seed, windows, parts):
    batch = random_batch(seed, windows)
    whole = windows_of(batch.items, batch.offsets, batch.predict_at, batch.targets)
    users = []
    for micro in split_batch(batch, parts):
        assert (micro.epoch, micro.index) == (1, 2)
        assert windows_of(micro.items, micro.offsets, micro.predict_at, micro.targets) == [
            whole[u] for u in micro.users
        ]
        assert micro.users.tolist() == sorted(micro.users)
        users += micro.users.tolist()
    assert sorted(users) == list(range(windows))


def test_rows_are_partitioned_evenly():
    assert [partition_rows(11, rank, 4) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 11)]
    assert [partition_rows(2, rank, 3) for rank in range(3)] == [(0, 1), (1, 2), (2, 2)]


def test_in_batch_candidates_are_distinct_targets_with_counts():
    batch = random_batch(3, 30)
    shard = shard_all(batch, 2)[1]
    expected = Counter(batch.targets.tolist())
    candidates = shard.item_ids[shard.candidates].tolist()
    assert candidates == sorted(expected)
    assert shard.counts.tolist() == [expected[c] for c in candidates]
    assert shard.item_ids.tolist() == sorted(set(batch.items.tolist()) | set(expected))
    assert shard.target_bias is None
    assert shard.bias.tolist() == pytest.approx([math.log(expected[c]) for c in candidates], abs=1e-6)


def test_in_batch_loss_equals_that_over_all_other_targets():
    """The softmax over distinct candidates equals the plain one over the other predictions' next items (spec, section 5)."""
    batch = random_batch(4, 20)
    (shard,) = shard_all(batch, 1)
    logits = np.random.default_rng(1).normal(size=(batch.predictions, CATALOGUE))
    for p, target in enumerate(batch.targets.tolist()):
        others = [logits[p, t] for t in batch.targets.tolist() if t != target]  # repeats of the target masked out
        plain = logits[p, target] - np.logaddexp.reduce([logits[p, target], *others])
        ids = shard.item_ids[shard.candidates].numpy()
        mine = logits[p, ids] + shard.bias.numpy()
        mine[shard.targets[p]] = logits[p, target]
        assert logits[p, target] - np.logaddexp.reduce(mine) == pytest.approx(plain, abs=1e-5)


def test_in_batch_with_log_q():
    batch, popularity = random_batch(5, 25), np.arange(CATALOGUE) ** 2
    (shard,) = shard_all(batch, 1, log_q=True, cumulative_counts=ragged.offsets(popularity + 1))
    for c, bias, target_bias in zip(
        shard.item_ids[shard.candidates].tolist(), shard.bias, shard.target_bias, strict=True
    ):
        q = (popularity[c] + 1) / (popularity + 1).sum()
        assert float(bias) == pytest.approx(math.log(batch.targets.tolist().count(c)) - math.log(q), abs=1e-4)
        assert float(target_bias) == pytest.approx(-math.log(q), abs=1e-4)


@pytest.mark.parametrize(
    ("candidates", "log_q"), [("in_batch", False), ("in_batch", True), ("sampled", False), ("sampled", True)]
)
def test_marking_and_sorting_ids_give_equal_batches(monkeypatch, candidates, log_q):
    settings = {"samples": 30, "log_q": log_q, "cumulative_counts": ragged.offsets(np.arange(CATALOGUE) + 1), "seed": 3}
    for windows in (2, 25):
        shard = []
        for sparse in (0, math.inf):
            monkeypatch.setattr("antdist.data.stream.shard_batch.SPARSE", sparse)
            shard.append(shard_all(random_batch(8, windows), 3, candidates, **settings))
        for one, other in zip(*shard, strict=True):
            for name, value in vars(one).items():
                same = vars(other)[name]
                assert (
                    torch.equal(value, same) and value.dtype == same.dtype if torch.is_tensor(value) else value == same
                )


def test_cost_of_a_batch_is_independent_of_the_catalogue():
    """No array of a million million items can be made."""
    far = random_batch(9, 20, catalogue=10**12)
    shard = [shard_batch(far, rank=r, world_size=2, candidates="in_batch", catalogue_size=10**12) for r in range(2)]
    expected = windows_of(far.items, far.offsets, far.predict_at, far.targets)
    assert sorted(map(repr, expected)) == sorted(repr(w) for d in shard for w in as_ids(d))


def test_catalogue_candidates_are_all_items():
    batch = random_batch(6, 10)
    (shard,) = shard_all(batch, 1, "catalogue", log_q=True)
    assert shard.item_ids.tolist() == shard.candidates.tolist() == list(range(CATALOGUE))
    assert shard.targets.tolist() == batch.targets.tolist() and shard.tokens.tolist() == batch.items.tolist()
    assert shard.counts.tolist() == np.bincount(batch.targets, minlength=CATALOGUE).tolist()
    assert shard.bias is None and shard.target_bias is None


@pytest.mark.parametrize("log_q", [False, True])
def test_sampled_candidates(log_q):
    batch, popularity = random_batch(7, 3), np.arange(CATALOGUE) * 10
    settings = {"samples": 50, "log_q": log_q, "cumulative_counts": ragged.offsets(popularity + 1), "seed": 3}
    (shard,) = shard_all(batch, 1, "sampled", step=1, **settings)
    candidates = shard.item_ids[shard.candidates].tolist()
    targets = Counter(batch.targets.tolist())
    assert set(targets) < set(candidates) and candidates == sorted(set(candidates))
    assert shard.counts.tolist() == [targets[c] for c in candidates]
    q = (popularity + 1) / (popularity + 1).sum()
    correction = np.log(50 * q[candidates]) if log_q else np.zeros(len(candidates))
    drawn = np.exp(shard.bias.double().numpy() + correction)
    assert drawn == pytest.approx(np.round(drawn), abs=1e-3) and round(drawn.sum()) == 50
    assert all(n > 0 or c in targets for c, n in zip(candidates, np.round(drawn), strict=True))
    if log_q:
        assert shard.target_bias.numpy() == pytest.approx(-correction, abs=1e-4)
    else:
        assert shard.target_bias is None
    (again,) = shard_all(batch, 1, "sampled", step=1, **settings)
    (other,) = shard_all(batch, 1, "sampled", step=2, **settings)
    assert torch.equal(shard.bias, again.bias) and torch.equal(shard.candidates, again.candidates)
    assert shard.item_ids.tolist() != other.item_ids.tolist()


@pytest.mark.parametrize("log_q", [False, True])
def test_draws_follow_their_distribution(log_q):
    popularity = np.array([0, 5, 94, 0])
    q = (popularity + 1) / 103 if log_q else np.full(4, 0.25)
    drawn = np.zeros(4)
    for step in range(50):
        shard = shard_batch(
            random_batch(0, 1, catalogue=4),
            rank=0,
            world_size=1,
            candidates="sampled",
            catalogue_size=4,
            samples=1000,
            log_q=log_q,
            cumulative_counts=ragged.offsets(popularity + 1),
            step=step,
        )
        ids = shard.item_ids[shard.candidates].numpy()
        correction = np.log(1000 * q[ids]) if log_q else 0
        drawn[ids] += np.exp(shard.bias.double().numpy() + correction)
    assert drawn / 50_000 == pytest.approx(q, abs=0.01)
