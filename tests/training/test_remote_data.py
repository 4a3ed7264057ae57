"""Training on data at a URI, larger than the cache: bit for bit as on a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antdist.batch import GlobalBatch
from antdist.config.schema import LossConfig, ModelConfig, StreamConfig, TrainingConfig
from antdist.data import cache as cached
from antdist.data.cache import Cache
from antdist.data.domain import open_domain
from antdist.data.stream.stream import Stream
from antdist.distributed.world import current_world
from antdist.features.catalogue import Catalogue
from antdist.model.recommender import build_recommender
from antdist.training.engines.plain import PlainEngine
from antdist.training.feed import Feed, StepInput
from antdist.training.trainer import Trainer
from tests.features.test_parts import give_parts
from tests.ranks import on_ranks
from tests.recorded import LOG, SLOW, count_opened
from tests.worlds import make_domain

DIMS = {"text": 12, "price": 6}
EPOCHS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of twelve shards of about 10 kB, and of feature tables of many parts."""
    folder = tmp_path_factory.mktemp("data")
    for name, users in (("one", 96), ("three", 90)):
        domain = make_domain(folder, name, users=users, items=40, blocks_per_shard=1, dims={})
        for modality, dim in DIMS.items():
            give_parts(domain, modality, dim, items_a_part=4)
    return folder


def learn(root: str, cache: Path, bound: int, trouble: bool, environment: dict[str, str]) -> dict[str, Any]:
    """Train, with `trouble` under damage to the cache; return the weights and the users of each step."""
    os.environ.update(environment)
    cached.WAITS = (0.01, 0.01)
    world = current_world()
    os.environ["LOCAL_WORLD_SIZE"] = str(world.size)
    domains = [open_domain(f"{root}/{name}", Cache(cache, bound)) for name in ("one", "three")]
    config = ModelConfig(modalities=list(DIMS), dim=8, experts=2, inner=8, max_length=6)
    training = TrainingConfig(epochs=EPOCHS, log_every=1)
    catalogue = Catalogue(domains, config.modalities)
    stream = Stream(domains, StreamConfig(batch_size=16, streams=1, window_shards=1), max_length=6, seed=0)
    catalogue.reserve_cache(stream.working_set_bytes())
    users: list[list[int]] = []

    class RecordingFeed(Feed):
        def inputs(self, batch: GlobalBatch) -> StepInput:
            if trouble and world.leader:
                _damage_cache(cache, batch.index)
            users.append(batch.users.tolist())
            return super().inputs(batch)

    popularity = np.concatenate([domain.popularity() for domain in domains])
    trainer = Trainer(
        engine=PlainEngine(build_recommender(config, catalogue.dims, seed=0), training, world),
        feed=RecordingFeed(stream, catalogue, LossConfig(negatives="in_batch"), popularity, 1, 0, world),
        config=training,
        world=world,
        folder=cache.parent / "run",
        seed=0,
        evaluate=lambda: {"Recall@10": 0.1, "NDCG@10": 0.1},
        log_metrics=lambda metrics, step: None,
    )
    trainer.train()
    return {"users": users, "weights": {n: w.numpy() for n, w in trainer.engine.state().weights.items()}}


def _damage_cache(cache: Path, index: int) -> None:
    """Delete the cache, or damage its files, at some steps."""
    if index % 5 == 3:
        shutil.rmtree(cache, ignore_errors=True)
    elif index % 5 == 4 and cache.is_dir():
        for path in sorted(cache.iterdir())[::2]:
            if path.suffix != ".partial" and path.name != "lock":
                _flip(path)


def _flip(path: Path) -> None:
    try:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        partial = path.with_name("flipped")
        partial.write_bytes(content)
        partial.replace(path)  # not the file that somebody has mapped
    except (FileNotFoundError, IndexError):
        pass


@pytest.fixture(scope="module")
def near(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, learn, str(data), tmp_path_factory.mktemp("near") / "cache", 1, False, {})


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert left[0]["weights"], "the leader has no weights"
    for a, b in zip(left, right, strict=True):
        assert a["users"] == b["users"] and len(a["users"]) > 3 * EPOCHS
        assert a["weights"].keys() == b["weights"].keys()
        for name, value in a["weights"].items():
            np.testing.assert_array_equal(value, b["weights"][name], err_msg=name)


def shards_of(data: Path) -> Iterator[Any]:
    for name in ("one", "three"):
        yield from open_domain(data / name).manifest.sequence_shards


def test_data_larger_than_the_cache_gives_equal_weights(data: Path, tmp_path: Path, near: list[dict[str, Any]]) -> None:
    sizes = [shard.bytes for shard in shards_of(data)]
    features = sum(
        table.bytes for table in Catalogue([open_domain(data / n) for n in ("one", "three")], list(DIMS))._all_tables()
    )
    bound = 6 * max(sizes) + features
    assert sum(sizes) > 2 * bound > 0, "the data fit the cache"
    far = on_ranks(2, learn, f"recorded://{data}", tmp_path / "cache", bound, False, {LOG: str(tmp_path / "log")})
    same(near, far)
    fetched = count_opened(tmp_path / "log")
    counts = [fetched[shard.name] for shard in shards_of(data)]  # both domains have shards of these names
    assert sum(counts) / 2 <= EPOCHS * len(counts), "a shard was fetched twice in a pass"
    assert max(counts) <= 2 * EPOCHS
    taken = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.name != "lock")
    assert sum(sizes) / 4 < taken <= bound


def test_cache_loss_and_damage_do_not_change_the_weights(
    data: Path, tmp_path: Path, near: list[dict[str, Any]]
) -> None:
    """The cache is deleted and damaged, the storage slow; features do not fit the cache."""
    bound = 10 * max(shard.bytes for shard in shards_of(data))
    environment = {LOG: str(tmp_path / "log"), SLOW: "0.01"}
    far = on_ranks(2, learn, f"recorded://{data}", tmp_path / "cache", bound, True, environment)
    same(near, far)
    assert max(count_opened(tmp_path / "log").values()) > EPOCHS
