"""Data damaged on one rank only: that rank names the file, and the others end with it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from antdist.config.schema import LossConfig, ModelConfig, StreamConfig, TrainingConfig
from antdist.data.domain import open_domain
from antdist.data.stream.order import permutation
from antdist.data.stream.stream import Stream
from antdist.distributed.world import current_world
from antdist.errors import UserError
from antdist.features.catalogue import Catalogue
from antdist.model.recommender import build_recommender
from antdist.training.engines.plain import PlainEngine
from antdist.training.feed import Feed
from antdist.training.trainer import Trainer
from tests.ranks import on_ranks
from tests.worlds import make_domain


def learn(folder: Path) -> tuple[list[int], str, float]:
    """Train on the rank's copy of the data; return the reported steps, the outcome and the seconds."""
    world = current_world()
    config = ModelConfig(dim=8, experts=2, inner=8, max_length=6)
    training = TrainingConfig(epochs=2, log_every=1)
    begin, steps = time.monotonic(), []
    try:
        domain = open_domain(folder / f"rank{world.rank}" / "d")
        catalogue = Catalogue([domain], config.modalities)
        stream = StreamConfig(batch_size=20, streams=1, window_shards=1)
        feed = Feed(
            Stream([domain], stream, max_length=6, seed=0),
            catalogue,
            LossConfig(negatives="in_batch"),
            domain.popularity(),
            1,
            0,
            world,
        )
        trainer = Trainer(
            engine=PlainEngine(build_recommender(config, catalogue.dims, seed=0), training, world),
            feed=feed,
            config=training,
            world=world,
            folder=folder / "run",
            seed=0,
            evaluate=lambda: {"Recall@10": 0.1, "NDCG@10": 0.1},
            log_metrics=lambda metrics, step: steps.append(step),
        )
        trainer.train()
    except UserError as error:
        return steps, f"UserError {error}", time.monotonic() - begin
    except RuntimeError as error:
        return steps, f"RuntimeError {error}", time.monotonic() - begin
    return steps, "finished", time.monotonic() - begin


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    make_domain(tmp_path / "rank0", "d", users=96, blocks_per_shard=2)
    shutil.copytree(tmp_path / "rank0", tmp_path / "rank1")
    return tmp_path


def test_shard_damaged_on_one_rank_ends_all_ranks(copies: Path) -> None:
    domain = open_domain(copies / "rank1" / "d")
    shards = [shard.name for shard in domain.manifest.sequence_shards]
    last = shards[int(permutation(len(shards), domain.fingerprint, 0, 0, "shards")[-1])]  # in the order of epoch 0
    path = domain.folder / last
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    (steps, survivor, waited), (_, victim, _) = on_ranks(2, learn, copies)
    assert len(steps) > 5
    assert "UserError" in victim and last in victim and "the file is damaged" in victim
    assert "RuntimeError" in survivor, survivor
    assert waited < 60, "the survivor hung until a time limit"


def test_intact_copies_train_to_the_end(copies: Path) -> None:
    results = on_ranks(2, learn, copies)
    assert [how for _, how, _ in results] == ["finished", "finished"]
    assert max(results[0][0]) > 20


def test_truncated_table_on_one_rank_ends_all_ranks(copies: Path) -> None:
    path = copies / "rank1" / "d" / "features" / "text-00000.npy"
    path.write_bytes(path.read_bytes()[:-4])
    (_, survivor, waited), (_, victim, _) = on_ranks(2, learn, copies)
    assert "UserError" in victim and "text-00000.npy" in victim
    assert "RuntimeError" in survivor, survivor
    assert waited < 60
