"""The feed: features of the rank's share of the items, cached or not; its thread ends."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antdist.batch import ROWS
from antdist.config.schema import LossConfig, StreamConfig
from antdist.data.domain import open_domain
from antdist.data.stream.stream import Stream
from antdist.distributed.world import World
from antdist.errors import UserError
from antdist.features.catalogue import Catalogue
from antdist.training import feed as feed_module
from antdist.training.feed import Feed
from tests.domains import numbered_domain

NAMES = ["one", "three"]


def make(data: Path, negatives: str, world: World | None = None, accumulation: int = 1) -> Feed:
    domains = [open_domain(data / name) for name in NAMES]
    stream = Stream(domains, StreamConfig(batch_size=60), max_length=6, seed=3)
    loss = LossConfig.model_validate({"negatives": negatives, "samples": 20, "log_q": True})
    popularity = np.concatenate([domain.popularity() for domain in domains])
    return Feed(stream, Catalogue(domains, ["text", "price"]), loss, popularity, accumulation, 3, world or World())


def assert_equal(left: Any, right: Any) -> None:
    assert left.values.keys() == right.values.keys() == left.present.keys()
    for modality, values in left.values.items():
        assert values.dtype == torch.float32 and torch.equal(values, right.values[modality])
        assert torch.equal(left.present[modality], right.present[modality])
    assert torch.equal(left.index, right.index)


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("feed", "shards"))]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("negatives", ["in_batch", "sampled", "catalogue"])
@pytest.mark.parametrize("rank", [0, 1])
def test_step_gets_the_features_of_its_share(
    data: Path, negatives: str, cached: bool, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cached:  # as on a GPU with enough memory
        monkeypatch.setattr(feed_module, "cache_budget", lambda device: float("inf"))
        monkeypatch.setattr(feed_module, "CACHE_CHUNK", 7)
    feed = make(data, negatives, World(rank, 2), accumulation=2)
    micros = [micro for step in itertools.islice(feed.epoch(0, 0), 3) for micro in step.micro_batches]
    assert len(micros) == 6
    for micro in micros:
        assert (micro.features is None) == (cached and negatives != "catalogue")
        batch, features = feed.to_device(micro)
        share = batch.item_ids[slice(*batch.share)]
        assert 0 < len(share) < len(batch.item_ids)
        padded = len(share)
        if negatives != "catalogue":  # whose size is the same in every step
            padded = -(-len(share) // ROWS) * ROWS
            assert padded > len(share)
        expected = np.concatenate([share.numpy(), np.repeat(share.numpy()[-1:], padded - len(share))])
        assert_equal(features, feed.catalogue.features(expected))


def test_catalogue_features_are_looked_up_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups = []
    real = Catalogue.features
    monkeypatch.setattr(Catalogue, "features", lambda self, ids: lookups.append(len(ids)) or real(self, ids))
    feed = make(data, "catalogue")
    found = [
        feed.to_device(micro)[1] for epoch in (0, 1) for step in feed.epoch(epoch, 0) for micro in step.micro_batches
    ]
    assert len(found) > 4 and lookups == [feed.catalogue.size]
    assert len({features.values["text"].data_ptr() for features in found}) == 1


def test_features_are_cached_only_if_they_fit(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = make(data, "in_batch")
    # text and price: 4 bytes per number and 1 per presence flag; 8 per id
    size = feed.catalogue.size * (sum(4 * dim + 1 for dim in feed.catalogue.dims.values()) + 8)
    for bytes_free, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr(feed_module, "cache_budget", lambda device, free=bytes_free: free)
        assert (make(data, "in_batch").cached_features is not None) == fits


def test_cpu_caches_no_features(data: Path) -> None:
    assert feed_module.cache_budget(torch.device("cpu")) == 0
    assert make(data, "in_batch").cached_features is None


def test_prefetching_does_not_change_the_inputs(data: Path) -> None:
    feed = make(data, "sampled")
    for start in (0, 2):
        ahead, plain = list(feed.epoch(1, start)), [feed.inputs(batch) for batch in feed.stream.batches(1, start)]
        assert [step.step for step in ahead] == [step.step for step in plain]
        for a, p in zip(ahead, plain, strict=True):
            for mine, other in zip(a.micro_batches, p.micro_batches, strict=True):
                assert torch.equal(mine.batch.tokens, other.batch.tokens) and mine.weight == other.weight
                assert_equal(feed.to_device(mine)[1], feed.to_device(other)[1])


def test_leaving_an_epoch_early_ends_the_thread(data: Path) -> None:
    inputs = iter(make(data, "in_batch").epoch(0, 0))
    next(inputs)
    assert "feed" in running()
    inputs.close()  # type: ignore[attr-defined]
    assert running() == []


def test_prefetch_error_is_raised_in_the_step(data: Path, tmp_path: Path) -> None:
    domain = numbered_domain(tmp_path / "d", [9] * 40)
    shard = tmp_path / "d" / domain.manifest.sequence_shards[2].name
    shard.write_bytes(shard.read_bytes()[:1000])
    config = StreamConfig(batch_size=20, streams=1, window_shards=1)
    stream = Stream([domain], config, max_length=8, seed=0)
    plain = make(data, "in_batch")
    items = domain.manifest.items
    feed = Feed(stream, Zeros(items), plain.loss, np.ones(items, np.int64), 1, 0, World())
    with pytest.raises(UserError, match=shard.name):
        list(feed.epoch(0, 0))
    assert running() == []


class Zeros:
    """Zero features, for a domain without tables."""

    def __init__(self, size: int) -> None:
        self.size, self.dims = size, {"text": 2}

    def features(self, item_ids: Any) -> Any:
        n = len(item_ids)
        return feed_module.ItemInputs(
            {"text": torch.zeros(n, 2)}, {"text": torch.zeros(n, dtype=torch.bool)}, torch.from_numpy(item_ids.copy())
        )
