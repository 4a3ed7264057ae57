"""Law 1: the order of batches is a function of manifests, seed, epoch and number; no prediction is missed or repeated."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antdist import ragged
from antdist.config.schema import StreamConfig
from antdist.data import domain as domain_module
from antdist.data.domain import open_domain
from antdist.data.manifest import Manifest, write_manifest
from antdist.data.shards import ShardWriter, UserBlock, encode_npy
from antdist.data.stream import order as order_module
from antdist.data.stream import stream as stream_module
from antdist.data.stream.shard_batch import assign_windows, select_windows
from antdist.data.stream.stream import Stream, StreamState
from antdist.errors import UserError
from tests.domains import numbered_domain, training_targets

MODES = ("sequence", "prefix")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three domains of unlike sizes and lengths, of several shards each, and how long their users are."""
    random = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("world")
    lengths = {
        name: (3 + random.geometric(p, n)).tolist() for name, n, p in (("a", 70, 0.1), ("b", 25, 0.3), ("c", 9, 0.2))
    }
    return [numbered_domain(folder / name, of) for name, of in lengths.items()], list(lengths.values())


def make(domains, *, seed=0, max_length=8, **config):
    defaults = {"batch_size": 32, "window_shards": 2, "window_blocks": 3, "streams": 2}
    return Stream(domains, StreamConfig(**(defaults | config)), max_length=max_length, seed=seed)


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(vars(left).values(), vars(right).values(), strict=True))


def ledger(stream, lengths, epochs=1):
    """How often each prediction of each domain was made, checking that each stands on the items before it."""
    made = [Counter() for _ in lengths]
    first_user = ragged.offsets([len(of) for of in lengths])
    for batch in itertools.chain.from_iterable(stream.batches(epoch) for epoch in range(epochs)):
        assert len(batch.users) == len(batch.offsets) - 1 and batch.predictions > 0
        assert np.array_equal(batch.targets, batch.items[batch.predict_at] + 1)
        inner = np.setdiff1d(np.arange(1, len(batch.items)), batch.offsets)
        assert np.array_equal(batch.items[inner], batch.items[inner - 1] + 1)
        assert np.diff(batch.offsets).max() <= stream.max_length
        domain = np.searchsorted(stream.item_offsets, batch.targets, side="right") - 1
        window = np.searchsorted(batch.offsets, batch.predict_at, side="right") - 1
        for d, w, target in zip(domain.tolist(), window.tolist(), batch.targets.tolist(), strict=True):
            item = target - int(stream.item_offsets[d])
            made[d][item] += 1
            owner = int(np.searchsorted(np.cumsum(lengths[d]), item, side="right"))
            assert batch.users[w] == first_user[d] + owner
    return made


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    users=st.lists(
        st.lists(st.integers(3, 30), min_size=1, max_size=14).filter(lambda n: max(n) > 3), min_size=1, max_size=3
    ),
    mode=st.sampled_from(MODES),
    batches=st.sampled_from(["mixed", "single_domain"]),
    batch_size=st.integers(1, 40),
    max_length=st.integers(1, 9),
    streams=st.integers(1, 3),
    windows=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    packing=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    seed=st.integers(0, 3),
)
def test_an_epoch_makes_every_prediction_once(users, windows, packing, **config):
    with tempfile.TemporaryDirectory() as folder:
        block_users, blocks_per_shard = packing
        domains = [
            numbered_domain(Path(folder) / f"d{d}", of, block_users=block_users, blocks_per_shard=blocks_per_shard)
            for d, of in enumerate(users)
        ]
        stream = make(domains, window_shards=windows[0], window_blocks=windows[1], **config)
        for made, of in zip(ledger(stream, users), users, strict=True):
            assert made == Counter(training_targets(of))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batches", ["mixed", "single_domain"])
@pytest.mark.parametrize("mixing", [1.0, 0.3])
def test_starting_at_a_batch_gives_the_tail(world, mode, batches, mixing):
    stream = make(world[0], mode=mode, batches=batches, mixing=mixing)
    for epoch in (0, 3):
        whole = list(stream.batches(epoch))
        assert [batch.index for batch in whole] == list(range(stream.steps_per_epoch))
        for start in (1, 7, stream.steps_per_epoch - 1, stream.steps_per_epoch):
            tail = list(stream.batches(epoch, start))
            assert len(tail) == len(whole) - start
            assert all(same(*pair) for pair in zip(whole[start:], tail, strict=True))


def test_starting_late_reads_only_needed_shards(world, monkeypatch):
    stream, read = make(world[0][:1], window_shards=1, window_blocks=1), []
    shards = len(world[0][0].manifest.sequence_shards)
    monkeypatch.setattr(
        domain_module,
        "read_blocks",
        lambda folder, shard, items, real=domain_module.read_blocks: (
            read.append(shard.name) or real(folder, shard, items)
        ),
    )
    assert len(list(stream.batches(0, stream.steps_per_epoch - 1))) == 1
    assert 0 < len(read) <= 2 * 2 < shards  # two canonical streams, a batch that may cross from one window to the next
    read.clear()
    list(stream.batches(0))
    assert sorted(read) == sorted(shard.name for shard in world[0][0].manifest.sequence_shards)  # each once


@pytest.fixture
def read(monkeypatch):
    """Which shards were read, and by which thread."""
    shards, real = [], domain_module.read_blocks

    def recorded(folder, shard, items):
        shards.append((shard.name, threading.current_thread().name.partition("_")[0]))
        return real(folder, shard, items)

    monkeypatch.setattr(domain_module, "read_blocks", recorded)
    return shards


def one_by_one(domain, **config):
    """A stream that has one shard open at a time, and the order in which it reads the shards in epoch 0."""
    stream = make([domain], streams=1, window_shards=1, window_blocks=1, **config)
    names = [shard.name for shard in domain.manifest.sequence_shards]
    key = (domain.fingerprint, stream.seed, 0)
    return stream, [names[i] for i in order_module.permutation(len(names), *key, "shards")]


def test_a_thread_reads_one_window_ahead(world, read, monkeypatch):
    stream, order = one_by_one(world[0][0], batch_size=1)
    ahead = threading.Event()
    monkeypatch.setattr(
        domain_module,
        "read_blocks",
        lambda *args, real=domain_module.read_blocks: [list(real(*args)), len(read) > 1 and ahead.set()][0],
    )
    batches = stream.batches(0)
    next(batches)
    assert ahead.wait(60)
    batches.close()
    assert [shard for shard, _ in read] == order[:2]
    assert read[0][1] != "shards" and read[1][1] == "shards"
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("shards")]


@pytest.mark.parametrize("mixing", [1.0, 0.3])
def test_reading_ahead_changes_no_batch(world, mixing, monkeypatch):
    config = {"streams": 2, "window_shards": 1, "window_blocks": 1, "mixing": mixing}
    ahead = [list(make(world[0], **config).batches(epoch)) for epoch in (0, 1)]

    class WhenAsked:
        def __init__(self, *args, **kwargs):
            pass

        def submit(self, function, *args):
            return SimpleNamespace(result=lambda: function(*args))

        def shutdown(self, cancel_futures):
            pass

    monkeypatch.setattr(stream_module, "ThreadPoolExecutor", WhenAsked)
    for epoch in (0, 1):
        alone = list(make(world[0], **config).batches(epoch))
        assert len(alone) == len(ahead[epoch])
        assert all(same(*pair) for pair in zip(alone, ahead[epoch], strict=True))


def test_small_domain_is_read_once(world, read):
    domain = world[0][0]
    shards = len(domain.manifest.sequence_shards)
    for window_shards, times in ((-(-shards // 2), 1), (-(-shards // 2) - 1, 3)):
        stream = make([domain], streams=2, window_shards=window_shards)
        read.clear()
        for epoch in range(3):
            list(stream.batches(epoch))
        assert sorted(name for name, _ in read) == sorted(s.name for s in domain.manifest.sequence_shards * times)


@pytest.mark.parametrize("mode", MODES)
def test_chunk_size_changes_no_batch(world, mode, monkeypatch):
    expected = list(make(world[0], mode=mode).batches(0))
    monkeypatch.setattr(stream_module, "CHUNK", 3)
    for start in (0, 4):
        batches = list(make(world[0], mode=mode).batches(0, start))
        assert all(same(*pair) for pair in zip(expected[start:], batches, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_epochs_and_seeds_differ_and_repeat(world, mode):
    def epoch(number, seed):
        return np.concatenate([batch.targets for batch in make(world[0], mode=mode, seed=seed).batches(number)])

    first = epoch(0, 0)
    assert np.array_equal(first, epoch(0, 0))
    for other in (epoch(1, 0), epoch(0, 1)):
        assert sorted(other) == sorted(first)
        assert (other == first).mean() < 0.1


def test_batches_are_even(world):
    domains, lengths = world
    stream = make(domains, mode="prefix", batch_size=16)
    total = sum(len(training_targets(of)) for of in lengths)
    sizes = [batch.predictions for batch in stream.batches(0)]
    assert stream.predictions_per_epoch == sum(sizes) == total
    assert stream.steps_per_epoch == len(sizes) == -(-total // 16) and max(sizes) - min(sizes) <= 1
    # Every batch holds each domain's share of it, to within a prediction or so.
    share = len(training_targets(lengths[0])) / total
    for batch in stream.batches(0):
        assert abs((batch.targets < stream.item_offsets[1]).sum() - share * batch.predictions) <= 2
    sequence = make(domains, batch_size=64)
    assert np.mean([batch.predictions for batch in sequence.batches(0)]) == pytest.approx(64, rel=0.1)
    assert sequence.predictions_per_epoch == total


def test_prefix_batches_are_exact_where_the_size_divides(tmp_path):
    domain = numbered_domain(tmp_path / "d", [5, 7, 9, 3, 4, 8] * 4)  # 18 predictions, four times
    assert {batch.predictions for batch in make([domain], mode="prefix", batch_size=12).batches(0)} == {12}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_tempered_mixing_covers_each_domain_without_gaps(world, mode, mixing):
    domains, lengths = world
    stream = make(domains, mode=mode, mixing=mixing)
    sizes = [len(training_targets(of)) if mode == "prefix" else len(of) for of in lengths]
    epochs = 5
    made = ledger(stream, lengths, epochs)
    seen = []
    for counts, of in zip(made, lengths, strict=True):
        times = {counts[item] for item in training_targets(of)}
        assert max(times) - min(times) <= 1  # passes are finished before the next begins, across epochs
        seen.append(sum(counts.values()) / len(training_targets(of)))
    weights = np.array(sizes, float) ** mixing
    passes = weights / weights.sum() * sum(sizes) * epochs / sizes
    assert np.allclose(seen, passes, atol=0.8, rtol=0.15)


def test_single_domain_batches(world):
    domains, lengths = world
    stream = make(domains, batches="single_domain")
    turns = []
    for batch in stream.batches(0):
        of = set((np.searchsorted(stream.item_offsets, batch.targets, side="right") - 1).tolist())
        assert len(of) == 1
        turns += of
    assert Counter(turns) == {d: -(-len(training_targets(of)) // 32) for d, of in enumerate(lengths)}
    assert turns != sorted(turns)


def test_users_are_well_shuffled(tmp_path):
    users = 4096
    domain = numbered_domain(tmp_path / "d", [4] * users, block_users=64, blocks_per_shard=4)
    stream = make([domain], streams=2, window_shards=4, window_blocks=16)
    order = np.concatenate([batch.users for batch in stream.batches(0)])
    again = np.concatenate([batch.users for batch in stream.batches(1)])
    assert sorted(order.tolist()) == list(range(users))
    places = np.argsort(order)
    # Neighbours in the files are far from each other, and those of one epoch are not those of the next. A group has 1024
    # users of a stream, so two of one block lie within about 2048 places: a third of that apart on average.
    gaps = np.abs(np.diff(places))
    assert (gaps < 32).mean() < 0.1 and np.mean(gaps) > 400
    assert abs(np.corrcoef(places[:1024], np.argsort(again)[:1024])[0, 1]) < 0.5
    group = order[:64]
    assert len({user // 64 for user in group.tolist()}) > 16  # a batch mixes blocks, of several shards
    assert len({user // 256 for user in group.tolist()}) >= 4
    within = [u for u in order.tolist() if u < 64]
    assert abs(np.corrcoef(within, np.arange(64))[0, 1]) < 0.4


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_partition_the_batch(world, world_size):
    for batch in make(world[0]).batches(0):
        part = assign_windows(np.diff(batch.offsets), world_size)
        shares = [select_windows(batch, np.flatnonzero(part == rank)) for rank in range(world_size)]
        assert sorted(np.concatenate([s.targets for s in shares])) == sorted(batch.targets)
        assert sum(len(s.items) for s in shares) == len(batch.items)
        assert sorted(np.concatenate([s.users for s in shares])) == sorted(batch.users)


def test_batches_without_predictions_are_skipped(tmp_path):
    lengths = [3] * 30 + [5]
    domain = numbered_domain(tmp_path / "d", lengths)
    stream = make([domain], batch_size=1)
    batches = list(stream.batches(0))
    assert [b.predictions for b in batches] == [2] or [b.predictions for b in batches] == [1, 1]
    assert ledger(stream, [lengths]) == [Counter(training_targets(lengths))]


# ------------------------------------------------------------------------------------------------------------ state


def test_state_survives_json_and_is_accepted(world):
    stream = make(world[0])
    document = json.loads(json.dumps(dataclasses.asdict(stream.state(2, 5))))
    state = StreamState(**document)
    assert (state.epoch, state.batch) == (2, 5)
    make(world[0]).check_state(state)


def test_state_of_another_order_lists_the_differences(world, tmp_path):
    domains, lengths = world
    state = make(domains).state(0, 0)

    def refuse(stream):
        assert stream.order != make(domains).order
        with pytest.raises(UserError) as error:
            stream.check_state(state)
        return str(error.value)

    assert "seed was 0, is 1" in refuse(make(domains, seed=1))
    assert "stream.batch_size was 32, is 16" in refuse(make(domains, batch_size=16))
    assert "model.max_length was 8, is 9" in refuse(make(domains, max_length=9))
    assert "stream.mixing was 1.0, is 0.5" in refuse(make(domains, mixing=0.5))
    assert "domain 'c' is missing" in refuse(make(domains[:2]))
    assert "another order (a, b, c then, b, a, c now)" in refuse(make([domains[1], domains[0], domains[2]]))
    other = numbered_domain(tmp_path / "c", [*lengths[2], 4])
    message = refuse(make([*domains[:2], other]))
    assert "domain 'c' was prepared anew" in message and domains[2].fingerprint[:12] in message
    assert "domain 'new' is new" in refuse(make([*domains, numbered_domain(tmp_path / "new", [5])]))


def test_state_beyond_the_epoch_is_refused(world):
    stream = make(world[0])
    with pytest.raises(UserError, match=f"an epoch has {stream.steps_per_epoch} batches"):
        stream.check_state(stream.state(0, stream.steps_per_epoch + 1))


# -------------------------------------------------------------------------------------------------------- bad input


def test_no_domain():
    with pytest.raises(UserError, match=r"data\.domains: no domain"):
        make([])


def test_domain_twice(world):
    with pytest.raises(UserError, match="'a' occurs twice"):
        make([world[0][0], world[0][1], world[0][0]])


def test_domain_with_nothing_to_predict(tmp_path):
    with pytest.raises(UserError, match="nothing to learn from") as error:
        make([numbered_domain(tmp_path / "d", [3, 3])])
    assert str(tmp_path / "d") in str(error.value)


def test_batches_too_small_for_the_ranks(world):
    make(world[0], batch_size=64).check_ranks(3)
    for ranks, accumulation in ((20, 1), (5, 4)):
        with pytest.raises(UserError, match=r"stream\.batch_size: a micro-batch has .* fewer than the .* workers"):
            make(world[0], batch_size=64).check_ranks(ranks, accumulation)


def test_truncated_shard_is_named(tmp_path):
    domain = numbered_domain(tmp_path / "d", [9] * 20)
    shard = tmp_path / "d" / domain.manifest.sequence_shards[1].name
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=shard.name):
        list(make([domain]).batches(0))


def test_flipped_bit_names_the_shard(tmp_path):
    """Wherever it falls: in an item's index that stays valid, in a header, in the padding."""
    domain = numbered_domain(tmp_path / "d", [9] * 8, blocks_per_shard=9)
    shard = tmp_path / "d" / domain.manifest.sequence_shards[0].name
    sound = shard.read_bytes()
    items = sound.index(b"block-000000.items.npy") + 512 + 128
    assert sound[items : items + 8] == bytes([0, 0, 0, 0, 1, 0, 0, 0])  # items 0 and 1
    for place in (items, 20, len(sound) - 1):
        damaged = bytearray(sound)
        damaged[place] ^= 2
        shard.write_bytes(damaged)
        with pytest.raises(
            UserError, match=rf"{shard.name}: the file is damaged: its SHA-256 differs from the manifest's"
        ):
            list(make([domain]).batches(0))
    shard.write_bytes(sound)
    list(make([domain]).batches(0))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"items": [0, 1, 2, 3, 4, 5, 6, 8]}, "column items names items outside 0 to 7"),
        ({"items": [0, 1, 2, -1, 4, 5, 6, 7]}, "column items names items outside 0 to 7"),
        ({"offsets": [0, 9, 8]}, "column offsets does not rise from 0"),
        ({"offsets": [1, 4, 8]}, "column offsets does not rise from 0"),
        ({"offsets": [0, 6, 8]}, "1 users have fewer than 3 interactions"),
    ],
)
def test_invalid_block_is_named_with_its_shard(tmp_path, columns, message):
    """A shard that its manifest vouches for, as another program may have written it."""
    domain = numbered_domain(tmp_path / "d", [4, 4])
    path = tmp_path / "d" / domain.manifest.sequence_shards[0].name
    right = {"offsets": [0, 4, 8], "items": range(8), "times": range(8)}
    block = UserBlock(*(np.array((right | columns)[name]) for name in right))
    with ShardWriter(path) as writer:
        for name, kind in (("offsets", "<i8"), ("items", "<i4"), ("times", "<i8")):
            writer.add(f"block-000000.{name}.npy", encode_npy(getattr(block, name).astype(kind)))
        writer.add("block-000000.users.json", b'["u0", "u1"]')
    content = domain.manifest.model_dump()
    content["sequence_shards"][0].update(bytes=writer.bytes, sha256=writer.sha256)
    write_manifest(domain.folder, Manifest.model_validate(content))
    with pytest.raises(UserError, match=rf"{path.name} \(block-000000\): {message}"):
        list(make([open_domain(domain.folder)], batch_size=2).batches(0))


def test_error_of_reading_ahead_is_raised_when_needed(tmp_path):
    domain = numbered_domain(tmp_path / "d", [9] * 40)
    stream, order = one_by_one(domain, batch_size=6)
    torn = tmp_path / "d" / order[2]
    torn.write_bytes(torn.read_bytes()[:1000])
    batches, given = stream.batches(0), 0
    with pytest.raises(UserError, match=torn.name):
        for _ in batches:
            given += 1
    users = {shard.name: shard.users for shard in domain.manifest.sequence_shards}
    assert given == users[order[0]] + users[order[1]]  # a user makes a batch: all of the first two shards
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("shards")]
