"""A worker's checks on its own node before it trains, and its share of the validation."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antdist.config.load import check_config
from antdist.config.schema import PretrainConfig, RelearnConfig
from antdist.data.domain import Domain, open_domain
from antdist.distributed.world import World, current_world
from antdist.errors import UserError
from antdist.evaluation.ranking import merge, rank_targets, validation_queries
from antdist.faults import corrupt
from antdist.features.catalogue import Catalogue
from antdist.model.recommender import build_recommender
from antdist.runs.folder import RunFolder
from antdist.runs.trials import Trial
from antdist.runs.workers import pretrain as pretraining
from antdist.runs.workers import trial as adapting
from antdist.runs.workers.common import check_features
from tests.ranks import on_ranks
from tests.worlds import make_domains

MODALITIES = ("text", "image", "price")


def train(job: str, data: Path, runs: Path) -> tuple[str, float]:
    """On a rank: train on the copy of its own node; return how it ended, and after how long."""
    world, begin = current_world(), time.monotonic()
    common: dict[str, Any] = {
        "data": {"root": str(data / f"rank{world.rank}"), "domains": ["aa"]},
        "model": {"dim": 8, "inner": 8, "experts": 2, "max_length": 5},
        "training": {"engine": "plain", "epochs": 1},
    }
    try:
        if job == "pretrain":
            settings = pretraining.PretrainSettings(check_config(PretrainConfig, common), "")
            pretraining.train_model(settings, world, RunFolder(runs), None)
        else:
            config = check_config(RelearnConfig, {**common, "target": "aa", "strategy": "scratch"})
            opened = open_domain(data / f"rank{world.rank}" / "aa")
            adapt_settings = adapting.AdaptSettings(config, "", RunFolder(runs), None, opened.fingerprint)
            trial = Trial("aa", "scratch", 0, RunFolder(runs))
            adapting.train_trial(adapt_settings, adapting.open_inputs(adapt_settings), trial, world, None)
    except (UserError, RuntimeError) as error:
        return f"{type(error).__name__} {error}", time.monotonic() - begin
    return "finished", time.monotonic() - begin


@pytest.mark.parametrize("job", ["pretrain", "relearn"])
def test_flipped_bit_in_features_ends_all_workers(tmp_path: Path, job: str) -> None:
    """The driver, which reads the tables of another node, cannot find it."""
    make_domains(tmp_path / "rank0", ["aa"])
    shutil.copytree(tmp_path / "rank0", tmp_path / "rank1")
    corrupt(tmp_path / "rank1" / "aa" / "features" / "image-00000.npy", "flip")
    (survivor, waited), (victim, _) = on_ranks(2, train, job, tmp_path, tmp_path / "run")
    assert "UserError" in victim and "image-00000.npy: this part of the feature table is damaged" in victim
    assert survivor.startswith("RuntimeError") and waited < 60
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_workers_of_a_node_share_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_domains(tmp_path, ["aa"])
    catalogue = Catalogue([open_domain(tmp_path / "aa")], MODALITIES)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def finders() -> list[str]:
        found = []
        for rank in ("0", "1"):
            monkeypatch.setenv("LOCAL_RANK", rank)
            try:
                check_features(catalogue)
            except UserError:
                found.append(rank)
        return found

    assert finders() == []
    for modality, finder in zip(MODALITIES, ("0", "1", "0"), strict=True):
        part = tmp_path / "aa" / "features" / f"{modality}-00000.npy"
        whole = part.read_bytes()
        corrupt(part, "flip")
        assert finders() == [finder]
        part.write_bytes(whole)


@pytest.mark.parametrize("limit", [None, 7, 2])
def test_each_rank_validates_its_share_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """Together they equal one rank; none holds the histories of all users."""
    make_domains(tmp_path, ["aa"])
    domain = open_domain(tmp_path / "aa")
    settings = {"seed": 3, "model": {"max_length": 5}, "training": {"validation_users": limit}}
    config = check_config(PretrainConfig, settings)
    whole = validation_queries(domain.sequences(), 5, limit=limit, seed=3)
    monkeypatch.setattr(Domain, "sequences", None)
    shares = [pretraining.rank_queries(config, domain, World(rank, 3)) for rank in range(3)]
    assert np.concatenate([share.users for share in shares]).tolist() == whole.users.tolist()
    model = build_recommender(config.model, Catalogue([domain], MODALITIES).dims, seed=1)
    embeddings = torch.randn(domain.manifest.items, config.model.dim, generator=torch.Generator().manual_seed(1))
    together = merge([rank_targets(model, embeddings, share) for share in shares])
    for name, value in vars(rank_targets(model, embeddings, whole)).items():
        assert getattr(together, name).tolist() == value.tolist()
