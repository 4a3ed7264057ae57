"""Artifacts in an S3 bucket that the client reaches directly: a second store, its own failures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from antdist.errors import UserError
from antdist.tracking import run as run_module
from antdist.tracking import store
from antdist.tracking.pruning import prune
from antdist.tracking.registry import Lineage, folder_digest, register
from antdist.tracking.resolve import resolve
from antdist.tracking.run import TrackedRun
from antdist.tracking.store import StoreUnavailable, connect, transfer_artifacts
from tests.ranks import free_port
from tests.stores import Bucket

LINEAGE = Lineage({"books": "f" * 64})
NOWHERE = f"http://127.0.0.1:{free_port()}"


@pytest.fixture
def run_id(uri: str, s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run whose artifacts go to a bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(run_module, "DELIVERY_SECONDS", 3600.0)
    experiment = connect(uri).create_experiment(s3.name, artifact_location=f"{s3.uri}/artifacts")
    return str(connect(uri).create_run(experiment).info.run_id)


@pytest.fixture(autouse=True)
def new_clients() -> Iterator[None]:
    """Forget the S3 clients that MLflow caches."""
    yield
    forget_clients()


def forget_clients() -> None:
    from mlflow.store.artifact import s3_artifact_repo

    s3_artifact_repo._cached_get_s3_client.cache_clear()


def take_down(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, NOWHERE)
    forget_clients()


def model(folder: Path, content: str = "weights") -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_text(content)
    return folder


def test_register_resolve_and_prune_in_an_s3_bucket(uri: str, run_id: str, s3: Bucket, tmp_path: Path) -> None:
    weights = model(tmp_path / "model")
    version = register(uri, run_id, weights, s3.name, LINEAGE, training_state=model(tmp_path / "state", "state"))
    assert version.source.startswith(f"{s3.uri}/artifacts/{run_id}/")
    found = resolve(version.uri, uri)
    assert folder_digest(found.folder) == folder_digest(weights) == version.digest
    assert resolve(f"runs:/{run_id}/model", uri).uri == version.uri
    register(uri, run_id, model(tmp_path / "better", "better"), s3.name, LINEAGE)
    assert len(s3.contents()) == 3
    assert [gone.uri for gone in prune(uri, pattern=s3.name, keep=1).removed] == [version.uri]
    assert list(s3.contents().values()) == [b"better"]


def test_an_unavailable_s3_bucket_is_retried(
    uri: str, run_id: str, s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) % 2 == 0:
            for name, value in s3.environment.items():
                monkeypatch.setenv(name, value)
            forget_clients()

    monkeypatch.setattr("time.sleep", sleep)
    take_down(monkeypatch)
    version = register(uri, run_id, model(tmp_path / "model"), s3.name, LINEAGE)
    assert len(slept) == 2 and version.version == 1
    take_down(monkeypatch)
    assert folder_digest(resolve(version.uri, uri).folder) == version.digest
    assert len(slept) == 4


def test_an_s3_outage_is_one_line_and_no_foreign_exception(
    uri: str, run_id: str, s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        register(uri, run_id, model(tmp_path / f"{number}", str(number)), s3.name, LINEAGE)
    take_down(monkeypatch)
    with pytest.raises(StoreUnavailable, match=r"the artifact store refused or failed: .*Could not connect"):
        register(uri, run_id, model(tmp_path / "model"), s3.name, LINEAGE)
    with pytest.raises(StoreUnavailable, match=rf"models:/{s3.name}/1: the files cannot be fetched|the artifact store"):
        resolve(f"models:/{s3.name}/1", uri)
    with pytest.raises(StoreUnavailable, match="the artifact store refused or failed"):
        resolve(f"runs:/{run_id}/model", uri)
    with pytest.raises(UserError, match=rf"models:/{s3.name}/1: its files cannot be removed"):
        prune(uri, pattern=s3.name, keep=1)
    run = TrackedRun(uri, run_id, tmp_path / "run", resumed=True)
    run.log_artifacts(tmp_path / "model", "profile")
    assert not run.flush() and run.outbox.path.stat().st_size > 0
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    assert run.finish() is None
    assert f"artifacts/{run_id}/artifacts/profile/model.safetensors" in s3.contents()


def test_timeout_is_long_only_during_artifact_transfers(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that proxies files does not answer until its own store has them."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

    monkeypatch.setenv(store.TIMEOUT, "7")
    with transfer_artifacts(uri):
        with transfer_artifacts(uri):
            assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == store.FILE_SECONDS >= 600
        assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == store.FILE_SECONDS
    assert os.environ[store.TIMEOUT] == "7"
    with (
        pytest.raises(StoreUnavailable, match="the artifact store refused or failed: ForeignError"),
        transfer_artifacts(uri),
    ):
        raise ForeignError
    for ours in (OSError("full"), AssertionError(), UserError("no")):
        with pytest.raises(type(ours)), transfer_artifacts(uri):
            raise ours
    assert os.environ[store.TIMEOUT] == "7"


class ForeignError(Exception):
    pass
