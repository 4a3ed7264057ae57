"""MLflow as users run it: a server on PostgreSQL and S3, artifacts through the server or direct."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antdist.tracking import run as run_module
from antdist.tracking import store
from antdist.tracking.registry import Lineage, folder_digest, register
from antdist.tracking.resolve import resolve
from antdist.tracking.run import start_run
from antdist.tracking.store import connect
from tests.stores import Bucket, Database, TrackingServer

pytestmark = pytest.mark.slow

MEGABYTES = 320
PROJECT = Path(__file__).resolve().parents[2]
LINEAGE = Lineage({"books": "f" * 64})

# Arguments: server, run folder, what to upload, where to download to. Prints the growth of its memory in bytes.
FREIGHT = r"""
import json, re, sys
from pathlib import Path
from antdist.tracking.registry import Lineage, register
from antdist.tracking.resolve import resolve, resolve_training_state
from antdist.tracking.run import start_run

uri, run_folder, model, state, cache = sys.argv[1], *map(Path, sys.argv[2:])
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
run = start_run(uri, "freight", "run", run_folder)
small = run_folder / "small"
small.mkdir()
(small / "file").write_bytes(b"0")
register(uri, run.run_id, small, "small", Lineage({"books": "f" * 64}), training_state=small)
resolve("models:/small/1", uri, cache)
before = peak()
version = register(uri, run.run_id, model, "freight", Lineage({"books": "f" * 64}), training_state=state)
uploaded = peak()
found = resolve(version.uri, uri, cache)
there = resolve_training_state(version.uri, uri, cache)
assert run.finish() is None
print(json.dumps([uploaded - before, peak() - before, str(found.folder), str(there.folder)]))
"""


def heavy(folder: Path, seed: int, megabytes: int = MEGABYTES) -> Path:
    """Write a folder with an incompressible file of this size, like weights, and a small file."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        for _ in range(megabytes):
            file.write(random.bytes(2**20))
    (folder / "card.json").write_text(json.dumps({"seed": seed}))
    return folder


@pytest.fixture
def served(
    request: pytest.FixtureRequest, tmp_path: Path, database: Database, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TrackingServer]:
    """Start a server with one way of transferring files.

    "links": directly to the bucket by links that the server signs, MLflow's default where possible; "server": all through
    the server; "keys": past the server, the only way in which a job needs the bucket's keys.
    """
    way = request.param
    monkeypatch.setattr(run_module, "MAX_RETRY_SECONDS", 2.0)
    monkeypatch.setattr(store, "WAITS", (1.0,) * 60)
    if way != "keys":
        for name in s3.environment:
            monkeypatch.delenv(name)
        monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", str(way == "links").lower())
        monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", str(way == "links").lower())
        monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", str(2**20))
    with TrackingServer(tmp_path / "server", database, s3, proxied=way != "keys") as server:
        yield server


@pytest.mark.parametrize("served", ["links", "server", "keys"], indirect=True)
def test_large_artifacts_transfer_in_little_memory(served: TrackingServer, tmp_path: Path) -> None:
    model, state = heavy(tmp_path / "model", 1), heavy(tmp_path / "state", 2, 16)
    done = subprocess.run(
        [sys.executable, "-c", FREIGHT, served.uri, tmp_path / "run", model, state, tmp_path / "cache"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr + (served.folder / "log").read_text()[-3000:]
    uploading, downloading, *folders = json.loads(done.stdout.splitlines()[-1])
    assert max(uploading, downloading) < 0.6 * MEGABYTES * 2**20, (uploading, downloading)
    assert [folder_digest(Path(folder)) for folder in folders] == [folder_digest(model), folder_digest(state)]
    keys = sorted(path for path in served.bucket.files().find(served.bucket.name) if "model.safetensors" in path)
    assert len(keys) == 2 and "/model/" in keys[0] and "/training_state/" in keys[1], keys


@pytest.mark.parametrize("served", ["server"], indirect=True)
def test_server_killed_during_transfer_gets_everything_once(
    served: TrackingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL and the bucket keep what the server had accepted before it was killed."""
    model, state = heavy(tmp_path / "model", 3), heavy(tmp_path / "state", 4, 16)
    steps = 4000
    run = start_run(served.uri, "served", "run", tmp_path / "run", config={"a": {"b": 1}})
    for step in range(1000):
        run.log({"loss": step / 3}, step)
    assert run.flush()
    registered: list[Any] = []

    def send() -> None:
        registered.append(register(served.uri, run.run_id, model, "heavy", LINEAGE, training_state=state))

    sending = threading.Thread(target=send)
    sending.start()
    while not store._transfers:
        time.sleep(0.05)
    time.sleep(0.5)
    served.kill()
    for step in range(1000, 3000):
        run.log({"loss": step / 3}, step)
    time.sleep(2)
    assert run.outbox.path.stat().st_size > 0
    assert "mlflow-artifacts/artifacts" in caplog.text and "retrying in" in caplog.text, "no upload was cut off"
    served.start()
    for step in range(3000, steps):
        run.log({"loss": step / 3}, step)
    sending.join(240)
    assert registered and registered[0].version == 1, "not registered"
    again = register(served.uri, run.run_id, model, "heavy", LINEAGE, training_state=state)
    assert again.version == 1
    assert run.finish(timeout=60) is None
    client = connect(served.uri)
    points = client.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(step, step / 3) for step in range(steps)]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert folder_digest(resolve("models:/heavy/latest", served.uri, tmp_path / "cache").folder) == again.digest
