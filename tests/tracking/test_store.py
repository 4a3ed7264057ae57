from __future__ import annotations

import http.server
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from antdist.config.schema import TrackingConfig
from antdist.errors import UserError
from antdist.tracking.store import (
    artifact_location,
    check_reachable,
    connect,
    redact,
    tracking_uri,
    translate_errors,
    ui_command,
)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_uri_from_config_then_environment_then_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(TrackingConfig(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment:5000/")
    assert tracking_uri(TrackingConfig(), tmp_path) == "http://from-environment:5000"
    assert tracking_uri(TrackingConfig(uri="https://from-config"), tmp_path) == "https://from-config"


def test_sqlite_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = tracking_uri(TrackingConfig(uri="sqlite:///here.db?timeout=5"), tmp_path)
    assert uri == f"sqlite:///{tmp_path}/here.db?timeout=5"
    assert artifact_location(uri) == f"file://{tmp_path}/mlartifacts"
    assert artifact_location("http://server:5000") is None


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("postgresql://me:hidden@db/mlflow", "mlflow server --backend-store-uri"),
        ("/a/folder", "start `mlflow server"),
        ("sqlite://", "visible to one process only"),
        ("sqlite:///:memory:", "Give sqlite:///FILE"),
    ],
)
def test_unsupported_stores_are_refused(uri: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        tracking_uri(TrackingConfig(uri=uri), tmp_path)
    assert str(error.value).startswith("tracking.uri: ") and told in str(error.value)
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://me:pw@host:5000/x", "http://***@host:5000/x"),
        ("failed at https://me:p@ss/w@host/api, later", "failed at https://***@host/api, later"),
        ("https://host/?a=1&access_token=abc&b=2", "https://host/?a=1&access_token=***&b=2"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("models:/NAME@champion", "models:/NAME@champion"),
        ('{"uri": "http://u:p@h", "mail": "x@y"}', '{"uri": "http://***@h", "mail": "x@y"}'),
    ],
)
def test_redact(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_unavailable_server_is_reported_without_credentials() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(UserError) as error:
        check_reachable(f"http://me:hidden@127.0.0.1:{port}", timeout=2)
    assert time.monotonic() - begin < 3
    assert "does not answer" in str(error.value) and "start it" in str(error.value).lower()
    assert "hidden" not in str(error.value)


def test_silent_server_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"does not answer within 0\.5 s"):
            check_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5)
        assert time.monotonic() - begin < 2


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, int]]]:
    """A server that answers /health with the status that the test sets."""
    answer = {"status": 200}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"] if self.path == "/health" else 418)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", answer
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(
    ("status", "told"), [(404, "does not answer as MLflow does"), (500, "reports an internal error")]
)
def test_server_errors_are_reported(server: tuple[str, dict[str, int]], status: int, told: str) -> None:
    uri, answer = server
    check_reachable(uri)
    answer["status"] = status
    with pytest.raises(UserError, match=told):
        check_reachable(uri)
    answer["status"] = 401
    check_reachable(uri)


def test_sqlite_store_that_is_not_writable(tmp_path: Path) -> None:
    check_reachable(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert not (tmp_path / "new/mlflow.db").exists()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot be created"):
        check_reachable(f"sqlite:///{tmp_path}/file/below/mlflow.db")
    (tmp_path / "text.db").write_text("no database" * 100)
    with pytest.raises(UserError, match="not a database") as error:
        check_reachable(f"sqlite:///{tmp_path}/text.db")
    assert "text.db" in str(error.value)


def test_sqlite_store_that_is_locked(tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / "held.db")
    holder.execute("CREATE TABLE t (x)")
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="locked"):
        check_reachable(f"sqlite:///{tmp_path}/held.db", timeout=0.2)
    holder.rollback()
    check_reachable(f"sqlite:///{tmp_path}/held.db", timeout=0.2)
    holder.close()


def test_ui_command_binds_to_loopback(tmp_path: Path) -> None:
    command = ui_command(f"sqlite:///{tmp_path}/mlflow.db")
    assert f"ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in command
    assert command.endswith("--host 127.0.0.1")
    assert "hidden" not in ui_command("http://me:hidden@server:5000")


def test_mlflow_errors_are_redacted() -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(UserError) as error, translate_errors("http://me:hidden@server"):
        raise MlflowException("API request to http://me:hidden@server/api failed\nmore")
    assert "API request" in str(error.value) and "hidden" not in str(error.value)
    assert error.value.__suppress_context__


@pytest.mark.parametrize("error", [requests.ConnectionError(), requests.ConnectionError("  \n")])
def test_errors_without_a_message_show_their_type(error: Exception) -> None:
    with pytest.raises(UserError, match="refused or failed: ConnectionError"), translate_errors("http://server"):
        raise error


WRITER = """
import sys
from pathlib import Path
from antdist.tracking.run import start_run
run = start_run(sys.argv[1], "shared", sys.argv[2], Path(sys.argv[3]))
for step in range(200):
    run.log({"loss": step / 2}, step)
    run.flush() if step % 10 == 0 else None
assert run.finish() is None
"""


def test_processes_share_a_new_sqlite_file(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, uri, f"writer-{n}", str(tmp_path / str(n))]) for n in range(2)
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    client = connect(uri)
    experiment = client.get_experiment_by_name("shared")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["writer-0", "writer-1"]
    for run in runs:
        assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == list(range(200))
