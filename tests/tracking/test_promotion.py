from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from antdist.cli.main import cli
from antdist.errors import UserError
from antdist.tracking.promotion import promote
from antdist.tracking.registry import Lineage
from antdist.tracking.resolve import resolve
from tests.tracking.versions import make_version

FOOD = Lineage({"food": "f1"}, target="food", strategy="relearn")


def held(uri: str, name: str, alias: str) -> int | None:
    return resolve(f"models:/{name}@{alias}", uri).version


@pytest.fixture(scope="module")
def name(uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Register `food`: validation 0.25 (champion), 0.125, 0.5 without transfer, none, 0.75 elsewhere."""
    folder = tmp_path_factory.mktemp("models")
    make_version(uri, folder, "food", FOOD, validation=0.25)
    make_version(uri, folder, "food", FOOD, validation=0.125)
    make_version(uri, folder, "food", FOOD, validation=0.5, promote=False, tags={"transfer": "none"})
    make_version(uri, folder, "food", FOOD)
    make_version(uri, folder, "food", Lineage({"food": "f2"}, target="food"), validation=0.75)
    return "food"


def test_an_alias_moves_only_to_a_better_version(uri: str, name: str) -> None:
    assert promote("models:/food/2", "trial", uri).lines() == [
        "trial of food: from no version to version 2 (trial: the first, with validation Recall@10 0.1250)"
    ]
    told = promote("models:/food/1", "trial", uri)
    assert (told.before, told.after, told.forced) == (2, 1, None) and held(uri, name, "trial") == 1
    with pytest.raises(UserError) as error:
        promote("models:/food/2", "trial", uri)
    assert str(error.value) == (
        "models:/food/2: not trial: validation Recall@10 0.1250 against 0.2500 of version 1. "
        "Name another version, or move the alias anyway with --force."
    )
    assert held(uri, name, "trial") == 1
    assert promote("models:/food@trial", "trial", uri).lines() == [
        "models:/food/1 is trial already, with validation Recall@10 0.2500"
    ]


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (2, "0.1250 against 0.2500 of version 1"),
        (3, "its transfer is none; champion: validation Recall@10 0.5000 against 0.2500"),
        (4, "has no validation metric"),
        (5, "learned another task"),
    ],
)
def test_champion_is_refused(uri: str, name: str, version: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        promote(f"models:/food/{version}", "champion", uri)
    assert held(uri, name, "champion") == 1


@pytest.mark.parametrize("transfer", [None, "ground truth", "positive"])
def test_champion_moves_only_with_proven_transfer(uri: str, tmp_path: Path, transfer: str | None) -> None:
    made = f"moving {transfer}"
    make_version(uri, tmp_path, made, FOOD, validation=0.25)
    tags = {} if transfer is None else {"transfer": transfer}
    make_version(uri, tmp_path, made, FOOD, validation=0.5, promote=False, tags=tags)
    assert promote(f"models:/{made}/2", "champion", uri).forced is None and held(uri, made, "champion") == 2


def test_other_aliases_do_not_require_transfer(uri: str, name: str) -> None:
    assert promote("models:/food/3", "doubtful", uri).forced is None and held(uri, name, "doubtful") == 3


def test_force_moves_an_alias_and_records_a_tag(uri: str, name: str) -> None:
    assert promote("models:/food/1", "best", uri, force=True).forced is None
    assert "forced.best" not in resolve("models:/food/1", uri).tags
    told = promote("models:/food/2", "best", uri, force=True)
    assert told.forced == "not best: validation Recall@10 0.1250 against 0.2500 of version 1"
    assert held(uri, name, "best") == 2
    assert resolve("models:/food/2", uri).tags["forced.best"].endswith(told.forced)


def test_promote_command(uri: str, name: str) -> None:
    where = ["--tracking-uri", uri]
    told = CliRunner().invoke(cli, ["promote", "models:/food/2", "mine", *where], catch_exceptions=False)
    assert told.output.startswith("mine of food: from no version to version 2") and held(uri, name, "mine") == 2
    CliRunner().invoke(cli, ["promote", "models:/food/4", "mine", "--force", *where], catch_exceptions=False)
    assert held(uri, name, "mine") == 4


@pytest.mark.parametrize(
    ("model", "alias", "told"),
    [
        ("models:/food/9", "champion", "'food' has no version 9; it has: 1, 2"),
        ("models:/none/1", "champion", "no registered model 'none'"),
        ("runs:/1/model", "champion", "not a reference to a registered model"),
        ("models:/food/1", "newest", "registering moves this alias"),
        ("models:/food/1", "latest", "cannot name an alias"),
        ("models:/food/1", "v3", "cannot name an alias"),
        ("models:/food/1", "a b", "cannot name an alias"),
    ],
)
def test_promote_refuses_bad_references_and_aliases(uri: str, name: str, model: str, alias: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        promote(model, alias, uri, force=True)
