"""What is found before a run takes time, and what is only worth knowing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from antdist.config.load import check_config
from antdist.config.schema import ModelConfig, PretrainConfig, RelearnConfig
from antdist.errors import UserError
from antdist.model.io import FeatureSource, ModelCard, save_model
from antdist.model.recommender import build_recommender
from antdist.orchestration.checks import check_pretrain, check_relearn
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


def test_a_target_that_the_parent_knows_is_said(world: Path) -> None:
    trained = parent(world, "trained")
    assert check_relearn(adapting(world, **{"from": trained})).notes == []
    notes = check_relearn(adapting(world, target="aa", **{"from": trained})).notes
    assert notes == ["the target aa is one of the parent's auxiliary domains: its gain is no transfer"]


def test_a_parent_that_does_not_name_its_encoders_is_taken_with_a_note(world: Path) -> None:
    imported = parent(world, "imported", kind="imported", domains=[])
    (note,) = check_relearn(adapting(world, strategy="auto", **{"from": imported})).notes
    assert "imported does not say which encoders made its text, image, price features" in note
    # where the tower is not inherited nothing depends on it
    assert check_relearn(adapting(world, strategy="relearn", **{"from": imported})).notes == []


def test_a_parents_tower_wants_features_of_its_dimension_and_encoder(world: Path) -> None:
    wide = parent(world, "wide", dims={**DIMS, "text": 13})
    with pytest.raises(
        UserError, match=r"the model reads text features of dimension 13, target has 12\. Featurize the"
    ):
        check_relearn(adapting(world, strategy="finetune", **{"from": wide}))
    other = parent(world, "other", features={"text": FeatureSource(identity="other")})
    with pytest.raises(UserError, match="text features of different encoders"):
        check_relearn(adapting(world, strategy="finetune", **{"from": other}))


def test_a_target_that_lacks_a_modality_of_the_parent_is_said(world: Path) -> None:
    notes = check_relearn(
        adapting(world, target="nopictures", strategy="auto", **{"from": parent(world, "full")})
    ).notes
    assert "no item of nopictures has image: models do without" in notes


def test_an_inherited_tower_has_only_the_modalities_that_are_named(world: Path) -> None:
    pictures = parent(world, "pictures", dims={"image": 10})
    with pytest.raises(
        UserError, match=r"model.modalities: the parent reads image and nothing else\. Name one of these"
    ):
        model = {**SMALL, "modalities": ["text"]}
        check_relearn(adapting(world, strategy="finetune", model=model, **{"from": pictures}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {**SMALL, "item_embeddings": True}}, "model.item_embeddings: they belong to the items of a target"),
        ({"tracking": {"registered_model": "a/b"}}, "tracking.registered_model: 'a/b' cannot name a registered model"),
        (
            {"training": {"deepspeed": {"zero_optimization": 3}}},
            "training.deepspeed.zero_optimization: is a section of keys, not 3",
        ),
    ],
)
def test_what_would_stop_a_pretraining_is_told_by_its_key(world: Path, change: dict[str, Any], message: str) -> None:
    tree: dict[str, Any] = {
        "data": {"root": str(world / "data"), "domains": ["aa", "bbb"]},
        "model": SMALL,
        "ray": {"storage": str(world / "runs")},
        **change,
    }
    with pytest.raises(UserError) as caught:
        check_pretrain(check_config(PretrainConfig, tree))
    assert message in str(caught.value)
