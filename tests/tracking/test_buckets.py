"""Artifacts in a bucket that the client reaches by itself: a store apart from the tracking store, with failures of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from antdist.errors import UserError
from antdist.tracking import run as run_module
from antdist.tracking import store
from antdist.tracking.pruning import prune
from antdist.tracking.registry import Lineage, folder_digest, register, resolve
from antdist.tracking.run import TrackedRun
from antdist.tracking.store import StoreAway, connect, moving_files
from tests.ranks import free_port
from tests.stores import Bucket

LINEAGE = Lineage({"books": "f" * 64})
NOWHERE = f"http://127.0.0.1:{free_port()}"


@pytest.fixture
def run_id(uri: str, s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run whose artifacts go to a bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(run_module, "INTERVAL", 3600.0)
    experiment = connect(uri).create_experiment(s3.name, artifact_location=f"{s3.uri}/artifacts")
    return str(connect(uri).create_run(experiment).info.run_id)


@pytest.fixture(autouse=True)
def new_clients() -> Iterator[None]:
    """MLflow keeps its clients of a bucket."""
    yield
    forget_clients()


def forget_clients() -> None:
    from mlflow.store.artifact import s3_artifact_repo

    s3_artifact_repo._cached_get_s3_client.cache_clear()


def away(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, NOWHERE)
    forget_clients()


def model(folder: Path, content: str = "weights") -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_text(content)
    return folder


def test_a_model_goes_to_the_bucket_and_comes_back_and_goes(uri: str, run_id: str, s3: Bucket, tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    version = register(uri, run_id, made, s3.name, LINEAGE, training_state=model(tmp_path / "state", "state"))
    assert version.source.startswith(f"{s3.uri}/artifacts/{run_id}/")
    found = resolve(version.uri, uri)
    assert folder_digest(found.folder) == folder_digest(made) == version.digest
    assert resolve(f"runs:/{run_id}/model", uri).uri == version.uri
    register(uri, run_id, model(tmp_path / "better", "better"), s3.name, LINEAGE)
    assert len(s3.contents()) == 3
    assert [gone.uri for gone in prune(uri, pattern=s3.name, keep=1).removed] == [version.uri]
    assert list(s3.contents().values()) == [b"better"]


def test_a_bucket_that_is_away_is_waited_for(
    uri: str, run_id: str, s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) % 2 == 0:
            for name, value in s3.environment.items():
                monkeypatch.setenv(name, value)
            forget_clients()

    monkeypatch.setattr(store.time, "sleep", sleep)
    away(monkeypatch)
    version = register(uri, run_id, model(tmp_path / "model"), s3.name, LINEAGE)
    assert len(slept) == 2 and version.version == 1
    away(monkeypatch)
    assert folder_digest(resolve(version.uri, uri).folder) == version.digest
    assert len(slept) == 4


def test_a_bucket_that_stays_away_is_one_line_and_never_a_package_s_own_error(
    uri: str, run_id: str, s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        register(uri, run_id, model(tmp_path / f"{number}", str(number)), s3.name, LINEAGE)
    away(monkeypatch)
    with pytest.raises(StoreAway, match=r"the artifact store refused or failed: .*Could not connect"):
        register(uri, run_id, model(tmp_path / "model"), s3.name, LINEAGE)
    with pytest.raises(StoreAway, match=rf"models:/{s3.name}/1: the files cannot be fetched|the artifact store"):
        resolve(f"models:/{s3.name}/1", uri)
    with pytest.raises(StoreAway, match="the artifact store refused or failed"):
        resolve(f"runs:/{run_id}/model", uri)
    with pytest.raises(UserError, match=rf"models:/{s3.name}/1: its files cannot be removed"):
        prune(uri, pattern=s3.name, keep=1)
    run = TrackedRun(uri, run_id, tmp_path / "run", resumed=True)
    run.log_artifacts(tmp_path / "model", "profile")
    assert not run.flush() and run.outbox.stat().st_size > 0
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    assert run.finish() is None
    assert f"artifacts/{run_id}/artifacts/profile/model.safetensors" in s3.contents()


def test_requests_may_take_long_while_files_move_and_no_longer(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hands files on is silent until its own store has them."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

    monkeypatch.setenv(store.TIMEOUT, "7")
    with moving_files(uri):
        with moving_files(uri):
            assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == store.FILE_SECONDS >= 600
        assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == store.FILE_SECONDS
    assert os.environ[store.TIMEOUT] == "7"
    with pytest.raises(StoreAway, match="the artifact store refused or failed: ForeignError"), moving_files(uri):
        raise ForeignError
    for ours in (OSError("full"), AssertionError(), UserError("no")):
        with pytest.raises(type(ours)), moving_files(uri):
            raise ours
    assert os.environ[store.TIMEOUT] == "7"


class ForeignError(Exception):
    pass
