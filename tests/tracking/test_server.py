"""Tracking against a real `mlflow server` on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from antdist.errors import UserError
from antdist.tracking import run as run_module
from antdist.tracking.registry import Lineage, register
from antdist.tracking.resolve import resolve, resolve_training_state
from antdist.tracking.run import start_run
from antdist.tracking.store import check_reachable, connect


def serve(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "log").open("ab") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    for _ in range(120):
        try:
            check_reachable(f"http://127.0.0.1:{port}", timeout=1)
            return server
        except UserError:
            time.sleep(0.5)
    stop(server)
    raise AssertionError((folder / "log").read_text())


def stop(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.slow
def test_server_restart_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "MAX_RETRY_SECONDS", 2.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    server = serve(tmp_path, port)
    try:
        run = start_run(uri, "served", "run", tmp_path / "run", config={"a": {"b": 1}})
        for step in range(2000):
            run.log({"loss": step / 3}, step)
        assert run.flush()
        stop(server)
        begin = time.monotonic()
        for step in range(2000, 4000):
            run.log({"loss": step / 3}, step)
        assert time.monotonic() - begin < 3
        time.sleep(5)
        assert run.outbox.path.stat().st_size > 0
        server = serve(tmp_path, port)
        for step in range(4000, 5000):
            run.log({"loss": step / 3}, step)
        assert run.finish(timeout=60) is None
        points = connect(uri).get_metric_history(run.run_id, "loss")
        assert [(point.step, point.value) for point in points] == [(step, step / 3) for step in range(5000)]

        for name in ("model", "state"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_bytes(name.encode() * 1000)
        version = register(
            uri, run.run_id, tmp_path / "model", "served", Lineage({"d": "f"}), training_state=tmp_path / "state"
        )
        cache = tmp_path / "cache"
        found = resolve("models:/served/latest", uri, cache)
        assert found.uri == version.uri and found.folder == cache / version.digest
        assert (found.folder / "file").read_bytes() == b"model" * 1000
        assert (
            resolve_training_state("models:/served@newest", uri, cache).folder / "file"
        ).read_bytes() == b"state" * 1000
        (found.folder / "file").write_bytes(b"damaged in the cache")
        assert (resolve(version.uri, uri, cache).folder / "file").read_bytes() == b"model" * 1000
        stored = next((tmp_path / "files").rglob("model/*/file"))
        stored.write_bytes(b"damaged in the store")
        assert resolve(version.uri, uri, cache).folder == found.folder
        with pytest.raises(UserError, match="digest differs"):
            resolve(version.uri, uri, tmp_path / "other cache")
        with pytest.raises(UserError, match="knows no run"):
            start_run(uri, "served", "run", tmp_path / "run", run_id="f" * 32)
    finally:
        stop(server)
