from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from antdist.cli.main import cli
from antdist.errors import UserError
from antdist.tracking import overview as module
from antdist.tracking.overview import lineage, overview, registry_uri
from antdist.tracking.registry import Lineage
from antdist.tracking.store import connect
from tests.tracking.versions import make_version, version


@pytest.fixture(scope="module")
def filled(uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two pre-trainings and what was re-learned from the first."""
    folder = tmp_path_factory.mktemp("models")
    data = Lineage({"books": "b0" * 32, "music": "c1" * 32})
    first = make_version(uri, folder, "pre", data, validation=0.25)
    make_version(uri, folder, "pre", data, validation=0.125)
    food = Lineage({"food": "f3" * 32}, target="food", strategy="relearn", parent=first.uri)
    make_version(uri, folder, "relearn-food", food, validation=0.5, tags={"transfer": "positive"})
    return uri


def test_versions_with_aliases_figures_and_lineage(filled: str) -> None:
    head, newest, first, food = overview(filled).lines()
    assert head.split() == ["model", "aliases", "Recall@10", "strategy", "transfer", "registered", "lineage"]
    assert newest.split()[:3] == ["pre/2", "newest", "0.1250"]
    assert first.split()[:3] == ["pre/1", "champion", "0.2500"]
    assert food.split()[:6] == ["relearn-food/1", "champion,", "newest", "0.5000", "relearn", "positive"]
    assert food.endswith("food f3f3f3f3 <- models:/pre/1 <- books b0b0b0b0, music c1c1c1c1")


def test_a_pattern_chooses_names_and_keeps_lineage_whole(filled: str) -> None:
    chosen = overview(filled, "relearn-*")
    assert [version.uri for version in chosen.versions] == ["models:/relearn-food/1"]
    assert chosen.lineage["models:/relearn-food/1"][1] == "models:/pre/1"
    with pytest.raises(UserError, match="--name: no model is named 'x\\*'; known names: pre, relearn-food"):
        overview(filled, "x*")


def test_all_pages_are_read(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 1)
    assert len(overview(filled).versions) == 3


def test_the_verb_tells_lines_and_writes_json(filled: str, tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    told = CliRunner().invoke(cli, ["models", "--tracking-uri", filled, "--json", str(file)], catch_exceptions=False)
    assert told.output.splitlines() == overview(filled).lines()
    food = json.loads(file.read_text())["models"][-1]
    assert (food["uri"], food["parent"], food["validation"]) == ("models:/relearn-food/1", "models:/pre/1", 0.5)
    assert food["fingerprints"] == {"food": "f3" * 32} and food["aliases"] == ["champion", "newest"]


def test_a_terminal_gets_a_table(filled: str) -> None:
    from io import StringIO

    from rich.console import Console

    page = Console(file=StringIO(), width=80)
    page.print(overview(filled).table())
    shown = page.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert all(told in shown for told in ("0.5000", "positive", "food f3f3f3f3", "models:/pre/1", "music c1c1c1c1"))


def test_without_a_store_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="no registry here"):
        registry_uri(tmp_path / "runs", None)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="does not answer"):
        registry_uri(tmp_path, "http://127.0.0.1:9")


def test_an_empty_registry_has_no_models(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    connect(uri)
    assert overview(uri, "any*").lines() == ["no models"]


def test_lineage_that_leaves_the_registry_or_goes_in_a_circle() -> None:
    gone, local = version("a", 1, "models:/b/9"), version("a", 2, "/models/ant")
    assert lineage(gone, {})[1:] == ["models:/b/9 (not in the registry)"]
    assert lineage(local, {})[1:] == ["/models/ant"]
    one, two = version("a", 3, "models:/a/4"), version("a", 4, "models:/a/3")
    assert lineage(one, {v.uri: v for v in (one, two)})[-1] == "models:/a/3 (in a circle)"
