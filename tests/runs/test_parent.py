"""The sources of a run: copied by content, recorded, and used while the registry is unreachable."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from antdist.config.load import check_config
from antdist.config.schema import ModelConfig, PretrainConfig, RelearnConfig, TrackingConfig
from antdist.errors import UserError
from antdist.faults import corrupt
from antdist.model.io import ModelCard, save_model
from antdist.model.recommender import build_recommender
from antdist.runs import adapt as relearning
from antdist.runs import parent as sources
from antdist.runs import pretrain as pretraining
from antdist.runs.adapt import relearn
from antdist.runs.checks import check_pretrain, check_relearn
from antdist.runs.folder import RunFolder
from antdist.runs.parent import fetch_source, resolve_source
from antdist.runs.pretrain import pretrain
from antdist.tracking.registry import Lineage, register
from antdist.tracking.resolve import ResolvedModel, resolve
from antdist.tracking.run import start_run
from antdist.tracking.store import tracking_uri
from antdist.training.checkpoints.local import save_checkpoint
from antdist.training.engines.base import EngineState
from tests.ranks import free_port
from tests.tracking.server import FakeServer, listening
from tests.worlds import make_domains

SMALL = {"dim": 8, "inner": 8, "experts": 2, "max_length": 5}
CHAMPION, LATEST = "models:/parent@champion", "models:/parent/latest"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared domains, and a registered model with training state."""
    folder = tmp_path_factory.mktemp("world")
    make_domains(folder / "data", ["aa", "target"])
    config = ModelConfig(**SMALL)
    dims: Any = {"text": 12, "image": 10, "price": 6}
    model = build_recommender(config, dims)
    save_model(folder / "model", model, ModelCard(kind="pretrained", config=config, dims=dims, domains=["aa"]))
    weights = {"w": next(model.parameters()).detach().clone()}
    save_checkpoint(folder / "state" / "checkpoints", 1, EngineState(weights, {"exp_avg": {}}), {}, 2, None)
    uri = store(folder)
    run = start_run(uri, "e", "parent", folder / "parent")
    assert run.finish() is None
    lineage = Lineage({"aa": "f"})
    register(uri, run.run_id, folder / "model", "parent", lineage, validation=0.1, training_state=folder / "state")
    return folder


def store(world: Path) -> str:
    return tracking_uri(TrackingConfig(uri=f"sqlite:///{world}/mlflow.db"), world)


def tree(world: Path, runs: Path, uri: str, offline_ok: bool) -> dict[str, Any]:
    return {
        "data": {"root": str(world / "data")},
        "model": SMALL,
        "ray": {"storage": str(runs)},
        "tracking": {"uri": uri, "offline_ok": offline_ok},
    }


def adapting(world: Path, runs: Path, uri: str, *, offline_ok: bool = True, parent: str = CHAMPION) -> RelearnConfig:
    return check_config(RelearnConfig, {**tree(world, runs, uri, offline_ok), "target": "target", "from": parent})


def resuming(world: Path, runs: Path, uri: str, *, offline_ok: bool = True) -> PretrainConfig:
    common = tree(world, runs, uri, offline_ok)
    return check_config(PretrainConfig, {**common, "data": {**common["data"], "domains": ["aa"]}, "resume": LATEST})


class Begun(Exception):
    """Raised where the workers would start."""


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings that each command passes to its workers, which are not started."""
    passed: list[Any] = []

    def begin(_work: Any, settings: Any, *_: Any) -> None:
        passed.append(settings)
        raise Begun

    for command in (pretraining, relearning):
        monkeypatch.setattr(command, "run_workers", begin)
        monkeypatch.setattr(command, "ray_session", lambda _: contextlib.nullcontext())
    return passed


def nowhere() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_relearn_uses_its_parent_copy_while_offline(
    world: Path, tmp_path: Path, settings: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Begun):
        relearn(adapting(world, tmp_path, store(world)))
    parent = settings[-1].parent
    assert parent.uri == "models:/parent/1" and "the tracking store is unreachable" not in capsys.readouterr().err
    folder = tmp_path / "relearn" / "target"
    assert parent.folder.parent == folder and (parent.folder / "model.json").is_file()
    remembered = json.loads((folder / "from.json").read_text())[CHAMPION]
    with pytest.raises(Begun):
        relearn(adapting(world, tmp_path, nowhere()))
    assert settings[-1].parent == parent
    told = capsys.readouterr().err
    assert told.count(f"{CHAMPION} is what it was on {remembered['looked_up']}: models:/parent/1, in {folder}") == 1
    with pytest.raises(UserError, match="the tracking server does not answer"):
        relearn(adapting(world, tmp_path, nowhere(), offline_ok=False))


def test_pretrain_resume_uses_its_state_copy_while_offline(
    world: Path, tmp_path: Path, settings: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Begun):
        pretrain(resuming(world, tmp_path, store(world)))
    folder = tmp_path / "pretrain"
    state, record = settings[-1].state, json.loads((folder / "run.json").read_text())
    assert state.parent == folder and record["run_id"] == resolve(LATEST, store(world)).run_id
    with pytest.raises(Begun):
        pretrain(resuming(world, tmp_path, nowhere()))
    assert settings[-1].state == state and json.loads((folder / "run.json").read_text()) == record
    assert capsys.readouterr().err.count(f"{LATEST} is what it was on ") == 1


def test_unresolved_model_is_refused_while_offline(world: Path, tmp_path: Path) -> None:
    away = r"this run never resolved it, and the tracking store is unreachable \(the tracking server does not answer"
    remedy = r"[Ss]tart the run once while the store is reachable, or name the model's folder instead"
    with pytest.raises(UserError, match=f"{CHAMPION}: {away}.*{remedy}"):
        check_relearn(adapting(world, tmp_path, nowhere()))
    with pytest.raises(UserError, match=f"{LATEST}: {away}.*{remedy}"):
        check_pretrain(resuming(world, tmp_path, nowhere()))
    found = check_relearn(adapting(world, tmp_path, nowhere(), parent=str(world / "model"))).start
    assert found is not None and found.folder == world / "model"


def test_resume_from_own_checkpoints_needs_no_registry(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "state" / "checkpoints", tmp_path / "pretrain" / "checkpoints")
    context = check_pretrain(resuming(world, tmp_path, nowhere()))
    assert context.start is None and any(f"so {LATEST} is not read" in note for note in context.report.notes)


@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
def test_damaged_copy_is_refused_and_fetched_again(world: Path, tmp_path: Path, how: Any) -> None:
    found = resolve(CHAMPION, store(world))
    place = fetch_source(CHAMPION, found, RunFolder(tmp_path))
    corrupt(place / "weights.safetensors", how)
    with pytest.raises(
        UserError, match=r"differs from what was fetched on .* \(another digest\).*once the tracking store is reachable"
    ):
        resolve_source(CHAMPION, nowhere(), RunFolder(tmp_path), resolve, offline_ok=True, note=print)
    assert fetch_source(CHAMPION, found, RunFolder(tmp_path)) == place
    assert (
        resolve_source(CHAMPION, nowhere(), RunFolder(tmp_path), resolve, offline_ok=True, note=print).folder == place
    )


def test_failing_store_is_offline_and_refusing_store_is_not(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = fetch_source(CHAMPION, resolve(CHAMPION, store(world)), RunFolder(tmp_path))
    with listening(FakeServer(tmp_path / "artifacts", mode="500")) as server:
        monkeypatch.setattr(sources, "check_reachable", lambda _: None)
        assert (
            resolve_source(CHAMPION, server.uri, RunFolder(tmp_path), resolve, offline_ok=True, note=print).folder
            == place
        )
    (tmp_path / "from.json").write_text((tmp_path / "from.json").read_text().replace(CHAMPION, "models:/parent@best"))
    with pytest.raises(UserError, match="has no alias 'best'; it has: champion"):
        resolve_source("models:/parent@best", store(world), RunFolder(tmp_path), resolve, offline_ok=True, note=print)


def test_sources_are_copied_once_by_content(tmp_path: Path) -> None:
    given = tmp_path / "cache"
    given.mkdir()
    (given / "weights").write_text("1")
    (tmp_path / "from.partial").mkdir()  # left by an interrupted copy
    (tmp_path / "from.partial" / "half").touch()

    def copy() -> Path:
        return fetch_source("models:/m/1", ResolvedModel(given, "models:/m/1"), RunFolder(tmp_path))

    first = copy()
    assert [path.name for path in first.iterdir()] == ["weights"] and copy() == first
    (given / "weights").write_text("2")
    assert copy() != first and (first / "weights").read_text() == "1"
