from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from antdist.cli.main import cli
from antdist.errors import UserError
from antdist.tracking import overview as module
from antdist.tracking.overview import load_overview, registry_uri, trace_lineage
from antdist.tracking.registry import Lineage
from antdist.tracking.store import connect
from tests.tracking.versions import make_version, version


@pytest.fixture(scope="module")
def filled(uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Register two pre-trainings and a model adapted from the first."""
    folder = tmp_path_factory.mktemp("models")
    data = Lineage({"books": "b0" * 32, "music": "c1" * 32})
    first = make_version(uri, folder, "pre", data, validation=0.25)
    make_version(uri, folder, "pre", data, validation=0.125)
    food = Lineage({"food": "f3" * 32}, target="food", strategy="relearn", parent=first.uri)
    make_version(uri, folder, "relearn-food", food, validation=0.5, tags={"transfer": "positive"})
    return uri


def test_overview_has_aliases_metrics_and_lineage(filled: str) -> None:
    head, newest, first, food = load_overview(filled).lines()
    assert head.split() == ["model", "aliases", "Recall@10", "strategy", "transfer", "registered", "lineage"]
    assert newest.split()[:3] == ["pre/2", "newest", "0.1250"]
    assert first.split()[:3] == ["pre/1", "champion", "0.2500"]
    assert food.split()[:6] == ["relearn-food/1", "champion,", "newest", "0.5000", "relearn", "positive"]
    assert food.endswith("food f3f3f3f3 <- models:/pre/1 <- books b0b0b0b0, music c1c1c1c1")


def test_a_pattern_selects_names_and_keeps_full_lineage(filled: str) -> None:
    chosen = load_overview(filled, "relearn-*")
    assert [version.uri for version in chosen.versions] == ["models:/relearn-food/1"]
    assert chosen.lineage["models:/relearn-food/1"][1] == "models:/pre/1"
    with pytest.raises(UserError, match="--name: no model is named 'x\\*'; known names: pre, relearn-food"):
        load_overview(filled, "x*")


def test_all_pages_are_read(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 1)
    assert len(load_overview(filled).versions) == 3


def test_models_command_prints_lines_and_writes_json(filled: str, tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    told = CliRunner().invoke(cli, ["models", "--tracking-uri", filled, "--json", str(file)], catch_exceptions=False)
    assert told.output.splitlines() == load_overview(filled).lines()
    food = json.loads(file.read_text())["models"][-1]
    assert (food["uri"], food["parent"], food["validation"]) == ("models:/relearn-food/1", "models:/pre/1", 0.5)
    assert food["fingerprints"] == {"food": "f3" * 32} and food["aliases"] == ["champion", "newest"]


def test_a_terminal_gets_a_table(filled: str) -> None:
    from io import StringIO

    from rich.console import Console

    page = Console(file=StringIO(), width=80)
    page.print(load_overview(filled).table())
    shown = page.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert all(told in shown for told in ("0.5000", "positive", "food f3f3f3f3", "models:/pre/1", "music c1c1c1c1"))


def test_reading_a_missing_registry_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="no registry here"):
        registry_uri(tmp_path / "runs", None)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="does not answer"):
        registry_uri(tmp_path, "http://127.0.0.1:9")


def test_an_empty_registry_has_no_models(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    connect(uri)
    assert load_overview(uri, "any*").lines() == ["no models"]


def test_lineage_outside_the_registry_and_circular_lineage() -> None:
    gone, local = version("a", 1, "models:/b/9"), version("a", 2, "/models/ant")
    assert trace_lineage(gone, {})[1:] == ["models:/b/9 (not in the registry)"]
    assert trace_lineage(local, {})[1:] == ["/models/ant"]
    one, two = version("a", 3, "models:/a/4"), version("a", 4, "models:/a/3")
    assert trace_lineage(one, {v.uri: v for v in (one, two)})[-1] == "models:/a/3 (circular lineage)"
