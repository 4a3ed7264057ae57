from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from antdist.errors import UserError
from antdist.tracking import run as run_module
from antdist.tracking.run import TrackedRun, start_run
from antdist.tracking.store import connect
from antdist.tracking.tags import environment_tags, flatten


@pytest.fixture
def slow_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave delivery to the test's own flush()."""
    monkeypatch.setattr(run_module, "DELIVERY_SECONDS", 3600.0)


class Flaky:
    """A client whose log_batch fails on the given calls, before or after the store has the records."""

    def __init__(self, client: Any, before: set[int], after: set[int]) -> None:
        self.client, self.before, self.after, self.calls = client, before, after, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def log_batch(self, *args: Any, **kwargs: Any) -> None:
        call, self.calls = self.calls, self.calls + 1
        if call in self.before:
            raise ConnectionError("unavailable")
        self.client.log_batch(*args, **kwargs)
        if call in self.after:
            raise ConnectionError("the answer was lost")


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in connect(uri).get_metric_history(run_id, key)]


def test_a_run_holds_params_tags_config_and_metrics(uri: str, tmp_path: Path) -> None:
    import mlflow.artifacts

    config = {"model": {"dim": 8, "text": "x" * 7000}, "tracking": {"uri": "http://me:hidden@host"}}
    config["deepspeed"] = {f"key{n:03}": n for n in range(250)}
    run = start_run(uri, "first", "name", tmp_path, config=config, tags={"fingerprint.books": "abc"})
    run.log({"validation/Recall@10": 0.25}, 3)
    run.log_text("table/result.json", '{"a": 1}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"123")
    run.log_artifacts(tmp_path / "model", "model")
    assert run.finish() is None
    stored = connect(uri).get_run(run.run_id)
    assert stored.info.status == "FINISHED" and stored.info.run_name == "name"
    assert stored.data.params["model.dim"] == "8" and len(stored.data.params) == 253
    assert stored.data.params["model.text"] == "x" * 6000
    assert stored.data.metrics == {"validation/Recall_at_10": 0.25}
    assert stored.data.tags["fingerprint.books"] == "abc"
    assert stored.data.tags["version.torch"].startswith("2.")
    folder = Path(mlflow.artifacts.download_artifacts(run_id=run.run_id, tracking_uri=uri))
    text = (folder / "config.yaml").read_text()
    assert "x" * 7000 in text and "hidden" not in text and "hidden" not in str(stored.data.params)
    assert json.loads((folder / "table/result.json").read_text()) == {"a": 1}
    assert (folder / "model/weights").read_bytes() == b"123"


@pytest.mark.usefixtures("slow_thread")
def test_points_arrive_once_in_order_despite_failing_requests(uri: str, tmp_path: Path) -> None:
    run = start_run(uri, "first", "flaky", tmp_path)
    assert run.flush()
    flaky = Flaky(connect(uri), before={0, 1, 4}, after={3})
    run._client = flaky
    steps, flushed = 0, []
    for _ in range(12):
        for _ in range(700):
            run.log({"loss": steps / 7}, steps)
            steps += 1
        flushed.append(run.flush())
    assert run.finish(timeout=20) is None
    assert flushed.count(False) == 4 and flushed[-1]
    assert history(uri, run.run_id, "loss") == [(step, step / 7) for step in range(steps)]
    assert run.outbox.path.stat().st_size == 0


@pytest.mark.usefixtures("slow_thread")
def test_logging_never_waits_for_the_store(uri: str, tmp_path: Path) -> None:
    run = start_run(uri, "first", "fast", tmp_path)
    run._client = Flaky(None, before=set(range(10**6)), after=set())
    begin = time.monotonic()
    for step in range(1000):
        run.log({"loss": 1.0, "rate": 2.0}, step)
    assert time.monotonic() - begin < 2
    undelivered = run.finish(timeout=1)
    assert time.monotonic() - begin < 5
    assert undelivered is not None and undelivered.outbox == run.outbox.path
    assert undelivered.records == len(run.outbox.path.read_text().splitlines()) > 2000


KILLED = """
import os, sys, signal
from pathlib import Path
from antdist.tracking import run as run_module
run_module.DELIVERY_SECONDS = 3600.0
run = run_module.TrackedRun(sys.argv[1], sys.argv[2], Path(sys.argv[3]), resumed=True)
for step in range(100):
    run.log({"loss": step * 1.0}, step)
    if step == 60:
        assert run.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("slow_thread")
def test_kill_and_resume_record_each_step_once(uri: str, tmp_path: Path) -> None:
    first = start_run(uri, "first", "killed", tmp_path, config={"a": 1})
    assert first.finish(status=None) is None
    subprocess.run([sys.executable, "-c", KILLED, uri, first.run_id, str(tmp_path)], timeout=120)
    assert len(history(uri, first.run_id, "loss")) == 61
    with first.outbox.path.open("ab") as file:
        file.write(b'{"kind": "metric", "key": "lo')  # torn
    again = start_run(uri, "first", "killed", tmp_path, config={"a": 2}, run_id=first.run_id)
    for step in range(40, 120):  # from the checkpoint at step 40
        again.log({"loss": step * 1.0}, step)
    assert again.finish() is None
    assert history(uri, first.run_id, "loss") == [(step, step * 1.0) for step in range(120)]
    stored = connect(uri).get_run(first.run_id)
    assert stored.info.status == "FINISHED" and stored.data.params["a"] == "1"
    assert not again.rejected.exists()


def test_resume_on_another_machine_records_each_step_once(uri: str, tmp_path: Path) -> None:
    first = start_run(uri, "first", "moved", tmp_path / "a")
    for step in range(10):
        first.log({"loss": 1.0}, step)
    assert first.finish("FAILED") is None
    again = start_run(uri, "first", "moved", tmp_path / "b", run_id=first.run_id)
    for step in range(5, 15):
        again.log({"loss": 1.0}, step)
    assert again.finish(status=None) is None
    assert [step for step, _ in history(uri, first.run_id, "loss")] == list(range(15))
    assert connect(uri).get_run(first.run_id).info.status == "RUNNING"


def test_only_a_new_run_needs_the_store_not_a_resumed_one(tmp_path: Path, caplog: Any) -> None:
    unavailable = "http://me:hidden@127.0.0.1:9"
    with pytest.raises(UserError, match="does not answer"):
        start_run(unavailable, "first", "n", tmp_path)
    with caplog.at_level(logging.WARNING, "antdist"):
        run = start_run(unavailable, "first", "n", tmp_path, run_id="0" * 32)
        run.log({"loss": 1.0}, 1)
        undelivered = run.finish(timeout=0.1)
    assert undelivered is not None and undelivered.records >= 2
    assert "records wait" in caplog.text and "hidden" not in caplog.text
    assert "hidden" not in run.outbox.path.read_text()


def test_a_failing_server_counts_as_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "check_reachable", lambda uri: None)  # /health answers, nothing else does
    unavailable = "http://127.0.0.1:9"
    with pytest.raises(UserError, match="refused or failed"):
        start_run(unavailable, "first", "n", tmp_path)
    run = start_run(unavailable, "first", "n", tmp_path, offline_ok=True)
    assert run.run_id.startswith(run_module.OFFLINE)
    assert run.finish(timeout=0.1) is not None


def test_an_unknown_run_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="knows no run 'feedbeef'"):
        start_run(uri, "first", "n", tmp_path, run_id="feedbeef")


def test_a_deleted_experiment_is_refused(uri: str, tmp_path: Path) -> None:
    client = connect(uri)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(UserError, match="mlflow experiments restore --experiment-id"):
        start_run(uri, "gone", "n", tmp_path)


def test_nan_and_inf_are_recorded_as_nan(uri: str, tmp_path: Path, caplog: Any) -> None:
    run = start_run(uri, "first", "nan", tmp_path)
    for step, value in enumerate([1.0, math.nan, math.inf, -math.inf]):
        run.log({"loss": value}, step)
    assert run.finish() is None
    values = [value for _, value in history(uri, run.run_id, "loss")]
    assert values[0] == 1.0 and len(values) == 4 and all(math.isnan(value) for value in values[1:])
    assert caplog.text.count("recorded as NaN") == 1


def test_a_refused_record_is_rejected_and_blocks_nothing(uri: str, tmp_path: Path) -> None:
    run = start_run(uri, "first", "refused", tmp_path)
    run.log({"good": 1.0, "a/../b": 2.0, "also good": 3.0}, 0)
    assert run.finish() is None
    assert connect(uri).get_run(run.run_id).data.metrics == {"good": 1.0, "also good": 3.0}
    assert json.loads(run.rejected.read_text())["key"] == "a/../b"


def test_a_full_disk_keeps_records_in_memory(uri: str, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    run = start_run(uri, "first", "full", tmp_path)
    path, run.outbox.path = run.outbox.path, Path("/dev/full")
    if not run.outbox.path.exists():
        pytest.skip("no /dev/full on this system")
    run.log({"loss": 1.0}, 0)
    run.log({"loss": 2.0}, 1)
    assert caplog.text.count("wait in memory") == 1
    run.outbox.path = path
    run.log({"loss": 3.0}, 2)
    assert run.finish() is None
    assert history(uri, run.run_id, "loss") == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_flatten() -> None:
    nested = {"a": {"b": 1, "c": {"d": None, "e": True}}, "f": [1, "x"], "g": "text", "h": {}}
    assert flatten(nested) == {"a.b": "1", "a.c.d": "null", "a.c.e": "true", "f": '[1, "x"]', "g": "text", "h": "{}"}


def test_environment_tags_with_and_without_a_checkout(tmp_path: Path) -> None:
    assert "mlflow.source.git.commit" not in environment_tags(tmp_path)
    environment = {**os.environ, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b"}
    environment |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    assert environment_tags(tmp_path)["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert environment_tags(tmp_path)["git.changed"] == "false"
    (tmp_path / "file").write_text("2")
    assert environment_tags(tmp_path)["git.changed"] == "true"
    (tmp_path / ".git" / "index").write_bytes(b"damaged")
    assert "git.changed" not in environment_tags(tmp_path)  # git status failed


def test_a_second_process_continues_the_run(uri: str, tmp_path: Path) -> None:
    driver = start_run(uri, "first", "handed", tmp_path)
    assert driver.finish(status=None) is None
    worker = TrackedRun(uri, driver.run_id, tmp_path, resumed=True)
    worker.log({"loss": 1.0}, 1)
    assert worker.finish(status=None) is None
    driver = TrackedRun(uri, driver.run_id, tmp_path, resumed=True)
    driver.log({"test/recall": 0.5}, 0)
    assert driver.finish() is None
    stored = connect(uri).get_run(driver.run_id)
    assert stored.data.metrics == {"loss": 1.0, "test/recall": 0.5} and stored.info.status == "FINISHED"
