"""The checks before a run: what they refuse, and what they only note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antdist.config.load import check_config
from antdist.config.schema import ModelConfig, PretrainConfig, RelearnConfig
from antdist.data.domain import open_domain
from antdist.errors import UserError
from antdist.faults import corrupt
from antdist.features.table import write_part
from antdist.model.io import FeatureSource, ModelCard, save_model
from antdist.model.recommender import build_recommender
from antdist.runs.checks import check_pretrain, check_relearn
from tests.features.test_parts import give_parts
from tests.worlds import make_domain, make_domains

SMALL = {"dim": 8, "inner": 8, "experts": 2, "max_length": 5}
DIMS = {"text": 12, "image": 10, "price": 6}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_domains(folder / "data", ["aa", "bbb", "target"])
    make_domain(folder / "data", "nopictures", dims={"text": 12, "price": 6})
    return folder


def parent(world: Path, name: str, **changes: Any) -> str:
    config = ModelConfig(**SMALL)
    card = {"kind": "pretrained", "config": config, "dims": DIMS, "domains": ["aa", "bbb"], **changes}
    save_model(world / name, build_recommender(config, card["dims"]), ModelCard.model_validate(card))
    return str(world / name)


def adapting(world: Path, **changes: Any) -> RelearnConfig:
    tree = {
        "target": "target",
        "data": {"root": str(world / "data")},
        "model": SMALL,
        "ray": {"storage": str(world / "runs")},
        **changes,
    }
    return check_config(RelearnConfig, tree)


def test_target_among_parent_domains_is_noted(world: Path) -> None:
    trained = parent(world, "trained")
    assert check_relearn(adapting(world, **{"from": trained})).report.notes == []
    notes = check_relearn(adapting(world, target="aa", **{"from": trained})).report.notes
    assert notes == ["the target aa is one of the parent's auxiliary domains: its gain is not transfer"]


def test_parent_without_encoder_names_is_noted(world: Path) -> None:
    imported = parent(world, "imported", kind="imported", domains=[])
    (note,) = check_relearn(adapting(world, strategy="auto", **{"from": imported})).report.notes
    assert "imported does not name the encoders of its text, image, price features" in note
    # nothing depends on it unless the tower is inherited
    assert check_relearn(adapting(world, strategy="relearn", **{"from": imported})).report.notes == []


def test_inherited_tower_needs_matching_features(world: Path) -> None:
    wide = parent(world, "wide", dims={**DIMS, "text": 13})
    with pytest.raises(
        UserError, match=r"the model reads text features of dimension 13, domain target has 12\. Featurize the"
    ):
        check_relearn(adapting(world, strategy="finetune", **{"from": wide}))
    other = parent(world, "other", features={"text": FeatureSource(identity="other")})
    with pytest.raises(UserError, match="text features of different encoders"):
        check_relearn(adapting(world, strategy="finetune", **{"from": other}))


def test_modality_missing_from_target_is_noted(world: Path) -> None:
    notes = check_relearn(
        adapting(world, target="nopictures", strategy="auto", **{"from": parent(world, "full")})
    ).report.notes
    assert "no item of nopictures has image: models do not read it" in notes


def test_inherited_tower_uses_only_named_modalities(world: Path) -> None:
    pictures = parent(world, "pictures", dims={"image": 10})
    with pytest.raises(UserError, match=r"model.modalities: the parent reads image only\. Name one of these"):
        model = {**SMALL, "modalities": ["text"]}
        check_relearn(adapting(world, strategy="finetune", model=model, **{"from": pictures}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {**SMALL, "item_embeddings": True}}, "model.item_embeddings: they belong to the items of a target"),
        ({"tracking": {"registered_model": "a/b"}}, "tracking.registered_model: 'a/b' cannot name a registered model"),
        (
            {"training": {"deepspeed": {"zero_optimization": 3}}},
            "training.deepspeed.zero_optimization: must be a section of keys, not 3",
        ),
        (
            {"ray": {"remote_storage": "file:///proc/no/such"}},
            "ray.remote_storage file:///proc/no/such: the storage cannot be written: does not answer, or refuses",
        ),
        ({"ray": {"remote_storage": "nowhere://x"}}, "ray.remote_storage nowhere://x: it cannot be used"),
        (
            {"data": {"root": "nowhere://k:s@x", "domains": ["aa"]}},
            "nowhere://***@x/aa/manifest.json: it cannot be used",
        ),
        ({"data": {"root": "memory://x", "domains": ["aa"]}}, "data.root: only one process can read it"),
        (
            {"data": {"root": "file:///proc/no", "cache": "s3://b/c", "domains": ["aa"]}},
            "data.cache s3://b/c: the cache must be a folder on each node's own disk",
        ),
        (
            {"training": {"deepspeed": {"wall_clock_brekdown": True}}},
            "training.deepspeed.wall_clock_brekdown: DeepSpeed has no such key; did you mean wall_clock_breakdown?",
        ),
    ],
)
def test_pretrain_refusals_name_the_key(world: Path, change: dict[str, Any], message: str) -> None:
    tree: dict[str, Any] = {
        "data": {"root": str(world / "data"), "domains": ["aa", "bbb"]},
        "model": SMALL,
        "ray": {"storage": str(world / "runs")},
        **change,
    }
    with pytest.raises(UserError) as caught:
        check_pretrain(check_config(PretrainConfig, tree))
    assert message in str(caught.value)


def test_remote_storage_is_probed_before_a_run(world: Path, tmp_path: Path) -> None:
    ray = {"storage": str(world / "runs"), "remote_storage": f"file://{tmp_path}/there"}
    report = check_relearn(adapting(world, strategy="scratch", ray=ray)).report
    assert f"remote storage file://{tmp_path}/there" in report.checked
    assert list((tmp_path / "there").iterdir()) == []


def far(folder: Path, cache_gb: float) -> PretrainConfig:
    tree = {
        "data": {
            "root": f"file://{folder}/data", "domains": ["d"], "cache": str(folder / "cache"), "cache_gb": cache_gb
        },
        "model": SMALL,
        "stream": {"streams": 1, "window_shards": 2},
        "ray": {"storage": str(folder / "runs"), "workers": 2},
    }  # fmt: skip
    return check_config(PretrainConfig, tree)


def test_too_small_cache_is_refused_with_a_sufficient_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = make_domain(tmp_path / "data", "d", users=96, blocks_per_shard=1, missing=0.0)
    shards = sum(sorted(shard.bytes for shard in domain.manifest.sequence_shards)[-6:])
    features = sum(path.stat().st_size for path in (tmp_path / "data/d/features").glob("*.npy"))
    with pytest.raises(
        UserError, match=rf"^data\.cache_gb: the cache has room for 1e-05 GB.* {shards / 1e9:.3g} GB; feat"
    ) as told:
        check_pretrain(far(tmp_path, 1e-5))
    enough = float(str(told.value).partition("Set data.cache_gb=")[2].partition(",")[0])
    assert shards + features <= enough * 1e9 < shards + features + 1e6
    report = check_pretrain(far(tmp_path, enough)).report
    assert report.notes == [] and any("sizes" in line and "verified when fetched" in line for line in report.checked)
    fetched = {path.name for path in (tmp_path / "cache").iterdir()}
    assert fetched == {"lock", domain.manifest.popularity.sha256}, "more than popularity"
    # a disk smaller than the bound
    monkeypatch.setattr("antdist.data.cache._free_bytes", lambda folder: 1000)
    with pytest.raises(
        UserError, match=rf"data\.cache {tmp_path}/cache: the cache has room .*Free its disk, or name a larger"
    ):
        check_pretrain(far(tmp_path, enough))


def test_features_larger_than_the_cache_are_noted(tmp_path: Path) -> None:
    domain = make_domain(tmp_path / "data", "d", users=96, items=600, blocks_per_shard=1, dims={})
    for modality in ("text", "image", "price"):
        give_parts(domain, modality, 64, items_a_part=4)
    shards = sum(sorted(shard.bytes for shard in domain.manifest.sequence_shards)[-6:])
    (note,) = check_pretrain(far(tmp_path, (shards + 60_000) / 1e9)).report.notes
    assert note.startswith("of the features, 0.000") and "the cache holds 6e-05 GB: they are fetched again" in note
    rows = (path for path in (tmp_path / "data/d/features").glob("*.npy") if "present" not in path.name)
    features = sum(path.stat().st_size for path in rows)
    assert f"up to {features / 1e9:.3g} GB a step" in note  # a step has so many items that it needs all parts
    tree = far(tmp_path, (shards + 60_000) / 1e9).model_dump()
    (note,) = check_pretrain(check_config(PretrainConfig, {**tree, "loss": {"negatives": "catalogue"}})).report.notes
    assert "they are fetched at the start, and again for each validation" in note


@pytest.mark.parametrize(("name", "how"), [("sequences-00000.tar", "cut"), ("features/image-00000.npy", "gone")])
def test_missing_or_short_remote_files_stop_a_run(tmp_path: Path, name: str, how: Any) -> None:
    make_domain(tmp_path / "data", "d")
    corrupt(tmp_path / "data" / "d" / name, how)
    with pytest.raises(UserError, match=rf"file://{tmp_path}/data/d/{name}: the file"):
        check_pretrain(far(tmp_path, 1.0))


def damaged(folder: Path, name: str, place: int) -> Path:
    (path,) = folder.glob(f"data/*/{name}")
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    return path


def with_nan(folder: Path) -> Path:
    """Write a table with correct digests and a NaN, as another program might."""
    domain = open_domain(folder / "data" / "aa")
    values = np.ones((domain.manifest.items, 12), np.float32)
    values[17, 3] = np.nan
    features = domain.folder / "features"
    part = write_part(features, "text", 0, first=0, values=values, present=np.ones(len(values), bool))
    meta = json.loads((features / "text.json").read_text())
    (features / "text.json").write_text(json.dumps({**meta, "present": len(values), "parts": [part.model_dump()]}))
    return features / "text-00000.npy"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda f: damaged(f, "sequences-00000.tar", 5000),
            "the file is damaged: its SHA-256 differs from the manifest's",
        ),
        (lambda f: damaged(f, "popularity.npy", -1), "the file is damaged: its SHA-256 differs from the manifest's"),
        (lambda f: damaged(f, "features/image-00000.npy", -1), "its size or digest differs from the recorded one"),
        (
            lambda f: damaged(f, "features/image-00000.present.npy", -1),
            "its size or digest differs from the recorded one",
        ),
        (with_nan, "the features of item 17 are NaN or Inf"),
    ],
)
def test_damaged_or_nan_data_stop_a_run(tmp_path: Path, harm: Any, message: str) -> None:
    make_domains(tmp_path / "data", ["aa"])
    tree = {
        "data": {"root": str(tmp_path / "data"), "domains": ["aa"]},
        "model": SMALL,
        "ray": {"storage": str(tmp_path / "runs")},
    }
    config = check_config(PretrainConfig, tree)
    assert any("every byte of shards and features" in line for line in check_pretrain(config).report.checked)
    path = harm(tmp_path)
    with pytest.raises(UserError) as caught:
        check_pretrain(config)
    assert str(path.parent) in str(caught.value) and message in str(caught.value)
    assert Path(caught.value.where or "").name.partition(".")[0] == path.name.partition(".")[0]
