"""A command opens each domain once in the driver and once in each worker."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from antdist.config.load import check_config
from antdist.config.schema import ModelConfig, PretrainConfig, RelearnConfig
from antdist.data import domain
from antdist.features.catalogue import Catalogue
from antdist.model.io import FeatureSource, ModelCard, save_model
from antdist.model.recommender import build_recommender
from antdist.runs import adapt, pretrain
from tests.worlds import make_domains

SMALL = {"dim": 8, "inner": 8, "experts": 2, "max_length": 5}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The domains whose manifests driver and worker read, in order; the worker runs in this process."""
    names: dict[str, list[str]] = {"driver": [], "worker": []}
    where, real = "driver", domain.read_manifest

    def count(folder: Path, *name: str) -> Any:
        names[where].append(folder.name)
        return real(folder, *name)

    def run_here(work: Callable[[Any], None], settings: Any, *_: Any) -> None:
        nonlocal where
        where = "worker"
        work(settings)
        where = "driver"

    for module in ("antdist.data.domain", "antdist.data.manifest"):
        monkeypatch.setattr(f"{module}.read_manifest", count)
    monkeypatch.setattr("antdist.runs.workers.common.is_node_leaving", lambda: False)  # asks Ray, which is not here
    for driver in (adapt, pretrain):
        monkeypatch.setattr(driver, "run_workers", run_here)
        monkeypatch.setattr(driver, "ray_session", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(driver, "follow", lambda _: contextlib.nullcontext())  # it would log what it follows
    return names


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data": {"root": str(folder / "data"), **changes.pop("data", {})},
        "model": SMALL,
        "training": {"engine": "plain", "epochs": 1},
        "ray": {"storage": str(folder / "runs")},
        **changes,
    }


def test_relearn_opens_its_target_once_in_driver_and_worker(tmp_path: Path, opened: dict[str, list[str]]) -> None:
    (target,) = make_domains(tmp_path / "data", ["target"])
    opened["driver"].clear()
    catalogue = Catalogue([target], ("text", "image", "price"))
    features = {m: FeatureSource(identity=identity) for m, identity in catalogue.identities.items()}
    card = ModelCard(kind="pretrained", config=ModelConfig(**SMALL), dims=catalogue.dims, features=features)
    save_model(tmp_path / "parent", build_recommender(card.config, card.dims), card)
    config = check_config(
        RelearnConfig, tree(tmp_path, target="target", strategy="auto", **{"from": str(tmp_path / "parent")})
    )
    done = adapt.relearn(config)
    assert [row.strategy for row in done.rows] == ["scratch", "finetune", "relearn"]
    assert opened == {"driver": ["target"], "worker": ["target"]}


def test_pretrain_opens_each_domain_once_in_driver_and_worker(tmp_path: Path, opened: dict[str, list[str]]) -> None:
    make_domains(tmp_path / "data", ["aa", "bbb"])
    opened["driver"].clear()
    pretrain.pretrain(check_config(PretrainConfig, tree(tmp_path, data={"domains": ["aa", "bbb"]})))
    assert opened == {"driver": ["aa", "bbb"], "worker": ["aa", "bbb"]}
