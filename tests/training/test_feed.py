"""What a rank's steps are fed: the features of the share's items, wherever they are held, and nothing left running."""

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
from antdist.features.table import Catalogue
from antdist.training import feed as feed_module
from antdist.training.feed import Feed
from tests.domains import numbered_domain
from tests.worlds import make_domains

NAMES = ["one", "three"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_domains(folder, NAMES)
    return folder


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


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("negatives", ["in_batch", "sampled", "catalogue"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_gets_the_features_of_its_share(
    data: Path, negatives: str, held: bool, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if held:  # as on a GPU that has room
        monkeypatch.setattr(feed_module, "room", lambda device: float("inf"))
        monkeypatch.setattr(feed_module, "HELD_CHUNK", 7)
    feed = make(data, negatives, World(rank, 2), accumulation=2)
    micros = [micro for step in itertools.islice(feed.epoch(0, 0), 3) for micro in step.micros]
    assert len(micros) == 6
    for micro in micros:
        assert (micro.features is None) == (held and negatives != "catalogue")
        batch, features = feed.bring(micro)
        share = batch.item_ids[slice(*batch.share)]
        assert 0 < len(share) < len(batch.item_ids)
        filled = len(share)
        if negatives != "catalogue":  # whose size is the same at every step
            filled = -(-len(share) // ROWS) * ROWS
            assert filled > len(share)
        expected = np.concatenate([share.numpy(), np.repeat(share.numpy()[-1:], filled - len(share))])
        assert_equal(features, feed.catalogue.features(expected))


def test_the_catalogue_is_looked_up_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = Catalogue.features
    monkeypatch.setattr(Catalogue, "features", lambda self, ids: asked.append(len(ids)) or real(self, ids))
    feed = make(data, "catalogue")
    brought = [feed.bring(micro)[1] for epoch in (0, 1) for step in feed.epoch(epoch, 0) for micro in step.micros]
    assert len(brought) > 4 and asked == [feed.catalogue.size]
    assert len({features.values["text"].data_ptr() for features in brought}) == 1


def test_features_beyond_the_devices_room_come_with_each_step(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = make(data, "in_batch")
    # text and price: four bytes a number and one a presence; and the id
    size = feed.catalogue.size * (sum(4 * dim + 1 for dim in feed.catalogue.dims.values()) + 8)
    for bytes_free, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr(feed_module, "room", lambda device, free=bytes_free: free)
        assert (make(data, "in_batch").held is not None) == fits


def test_a_cpu_keeps_no_copy_of_the_memory_map(data: Path) -> None:
    assert feed_module.room(torch.device("cpu")) == 0
    assert make(data, "in_batch").held is None


def test_reading_ahead_changes_nothing(data: Path) -> None:
    feed = make(data, "sampled")
    for start in (0, 2):
        ahead, plain = list(feed.epoch(1, start)), [feed.inputs(batch) for batch in feed.stream.batches(1, start)]
        assert [step.step for step in ahead] == [step.step for step in plain]
        for a, p in zip(ahead, plain, strict=True):
            for mine, other in zip(a.micros, p.micros, strict=True):
                assert torch.equal(mine.batch.tokens, other.batch.tokens) and mine.weight == other.weight
                assert_equal(feed.bring(mine)[1], feed.bring(other)[1])


def test_an_epoch_that_is_left_early_leaves_no_thread(data: Path) -> None:
    inputs = iter(make(data, "in_batch").epoch(0, 0))
    next(inputs)
    assert "feed" in running()
    inputs.close()  # type: ignore[attr-defined]
    assert running() == []


def test_what_goes_wrong_in_the_background_is_raised_in_the_step(data: Path, tmp_path: Path) -> None:
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
    """Features of nothing, for a domain without tables."""

    def __init__(self, size: int) -> None:
        self.size, self.dims = size, {"text": 2}

    def features(self, item_ids: Any) -> Any:
        n = len(item_ids)
        return feed_module.ItemInputs(
            {"text": torch.zeros(n, 2)}, {"text": torch.zeros(n, dtype=torch.bool)}, torch.from_numpy(item_ids.copy())
        )
