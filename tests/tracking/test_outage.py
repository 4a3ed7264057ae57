"""Tracking outages (no server, killed, slow, 500): training continues, records arrive later, once."""

from __future__ import annotations

import itertools
import json
import logging
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities import Metric

from antdist.errors import UserError
from antdist.tracking import outbox as outbox_module
from antdist.tracking import run as run_module
from antdist.tracking import store
from antdist.tracking.run import TrackedRun, resolve_run_id, start_run
from antdist.tracking.store import connect, retry_unavailable
from tests.ranks import free_port
from tests.tracking.server import FakeServer, listening


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave delivery to the test's own flush()."""
    monkeypatch.setattr(run_module, "DELIVERY_SECONDS", 3600.0)


def points_of(steps: range) -> list[tuple[int, float]]:
    return [(step, step / 7) for step in steps]


def log(run: TrackedRun, steps: range) -> None:
    for step, value in points_of(steps):
        run.log({"loss": value}, step)


@pytest.mark.usefixtures("by_hand")
def test_outage_and_500s_each_point_arrives_once_in_order(tmp_path: Path) -> None:
    server = FakeServer(tmp_path / "artifacts")
    with listening(server):
        run = start_run(server.uri, "e", "n", tmp_path / "run")
        log(run, range(1500))
        assert run.flush()
    log(run, range(1500, 3000))
    assert not run.flush()  # nobody listens
    assert sum(1 for _ in run.outbox.path.open()) == 1500
    server.mode = "500"
    with listening(server):
        assert not run.flush()
        server.mode = "lost"  # the first thousand arrive, and the answer is lost
        assert not run.flush()
        log(run, range(3000, 3100))
        server.mode = "up"
        assert run.flush()
        assert run.finish() is None
    assert server.history("loss") == points_of(range(3100))
    assert run.outbox.path.stat().st_size == 0 and not run.rejected.exists()


def test_log_does_not_wait_for_a_slow_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "DELIVERY_SECONDS", 0.01)
    server = FakeServer(tmp_path / "artifacts")
    with listening(server):
        run = start_run(server.uri, "e", "n", tmp_path / "run")
        server.mode = "slow"
        log(run, range(10))
        assert server.held.wait(30)
        log(run, range(10, 2000))  # the server answers nothing before this is done
        assert not server.released.is_set() and len(server.history("loss")) < 2000
        left = run.finish(status=None, timeout=0.1)
        assert left is not None and left.records >= 1990
        server.mode = "up"
        server.released.set()
        again = TrackedRun(server.uri, run.run_id, tmp_path / "run", resumed=True)
        assert again.finish() is None
    assert server.history("loss") == points_of(range(2000))


@pytest.mark.usefixtures("by_hand")
def test_a_released_outbox_belongs_to_the_next_process(tmp_path: Path) -> None:
    """A late answer to the driver's last request must not empty the outbox that the worker now writes."""
    server = FakeServer(tmp_path / "artifacts")
    with listening(server):
        driver = start_run(server.uri, "e", "n", tmp_path / "run")
        assert driver.flush()
        server.mode = "slow"
        log(driver, range(5))
        assert driver.finish(status=None, timeout=0.1) is not None
        assert server.held.wait(30)
        worker = TrackedRun(server.uri, driver.run_id, tmp_path / "run", resumed=True)
        server.mode = "up"
        server.released.set()
        driver._thread.join(30)
        assert worker.outbox.count_pending() == 5
        log(worker, range(5, 9))
        assert worker.finish() is None
    assert server.history("loss") == points_of(range(9))


def test_mlflow_does_not_retry_requests_by_itself(tmp_path: Path) -> None:
    """MLflow's own retries would create a second version or run after a lost answer."""
    with listening(FakeServer(tmp_path, mode="lost")) as server:
        with pytest.raises(Exception, match="500"):
            connect(server.uri).create_run("1")
        assert len(server.runs) == 1


def test_a_run_starts_offline_only_with_offline_ok(tmp_path: Path, caplog: Any) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match="does not answer"):
        start_run(uri, "e", "n", tmp_path / "run")
    with caplog.at_level(logging.WARNING, "antdist"):
        run = start_run(uri, "e", "n", tmp_path / "run", offline_ok=True)
    assert caplog.text.count("the run starts offline, its records wait in the outbox") == 1
    log(run, range(5))
    left = run.finish(timeout=0.1)
    assert left is not None and left.records >= 6


@pytest.mark.usefixtures("by_hand")
def test_an_offline_run_is_created_once_and_delivered_later(tmp_path: Path) -> None:
    server = FakeServer(tmp_path / "artifacts", port=free_port())
    first = start_run(server.uri, "e", "n", tmp_path / "run", config={"a": 1}, offline_ok=True)
    log(first, range(5))
    assert first.finish("FAILED", timeout=0.1) is not None
    with listening(server):
        server.mode = "lost"  # the run is created, and the answer is lost
        again = start_run(server.uri, "e", "n", tmp_path / "run", run_id=first.run_id)
        assert not again.flush() and not again.flush()
        server.mode = "up"
        log(again, range(3, 8))  # from a checkpoint
        assert again.finish("FINISHED") is None
        stored = resolve_run_id(server.uri, first.run_id, tmp_path / "run")
        third = start_run(server.uri, "e", "n", tmp_path / "run", run_id=first.run_id)
        log(third, range(8, 10))
        assert third.finish() is None
    assert list(server.runs) == [stored] and server.runs[stored]["info"]["status"] == "FINISHED"
    assert server.history("loss") == points_of(range(10))
    assert server.runs[stored]["data"]["params"] == [{"key": "a", "value": "1"}]


@pytest.mark.usefixtures("by_hand")
def test_a_growing_outbox_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(outbox_module, "THINNING_BYTES", 2**20)
    run = TrackedRun("http://127.0.0.1:9", "0" * 32, tmp_path, resumed=True)
    for _ in range(7):
        run.log_text("t", "x" * 2**19)
    assert [record.getMessage()[:5] for record in caplog.records if "wait in" in record.getMessage()] == [
        "1 MiB", "2 MiB", "3 MiB",
    ]  # fmt: skip
    run.finish(timeout=0)


@pytest.mark.usefixtures("by_hand")
def test_a_long_outage_thins_long_curves_and_loses_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    each, few, steps = 20_000, 50, 40_000
    monkeypatch.setattr(outbox_module, "THINNING_BYTES", each)
    monkeypatch.setattr(outbox_module, "UNTHINNED_POINTS", few)
    server = FakeServer(tmp_path / "artifacts", port=free_port())
    run = start_run(server.uri, "e", "n", tmp_path / "run", config={"a": 1}, offline_ok=True)
    for step in range(steps):
        run.log({"loss": step / 7}, step)
        if step % 1000 == 999:
            run.log({"recall": step / 9}, step)
        if step == steps // 2:  # a restart from a checkpoint some steps before
            assert run.finish(None, timeout=0) is not None
            run = TrackedRun(server.uri, run.run_id, tmp_path / "run", resumed=True)
            log(run, range(step - 500, step + 1))
    assert run.outbox.path.stat().st_size < 8 * each  # of 4 MB
    with listening(server):
        assert run.flush()
        log(run, range(steps, steps + 100))
        assert run.finish() is None
    assert server.history("recall") == [(step, step / 9) for step in range(999, steps, 1000)]
    assert next(iter(server.runs.values()))["data"]["params"] == [{"key": "a", "value": "1"}]
    points = server.history("loss")
    assert points == [(step, step / 7) for step, _ in points] and points[:few] == points_of(range(few))
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(points)]
    assert min(gaps) == 1 and 8 <= max(gaps) <= steps / 50  # the curve covers its full length
    assert points[-100:] == points_of(range(steps, steps + 100))  # in full detail once the server is back
    dropped = re.findall(r"(\d+) points of long curves were dropped because the outbox was large", caplog.text)
    assert len(dropped) == 2 and 0 <= len(points) + sum(map(int, dropped)) - (steps + 100) <= 500  # the repeated steps


@pytest.mark.parametrize("failing", [1, len(store.WAITS)])
def test_retry_until_the_store_answers(failing: int) -> None:
    from mlflow.exceptions import MlflowException

    calls = []

    def work() -> str:
        calls.append(1)
        if len(calls) <= failing:
            raise MlflowException("API request to http://me:hidden@host failed")
        return "done"

    assert retry_unavailable(work, "http://host") == "done"
    assert len(calls) == failing + 1


def test_retry_ends_and_never_repeats_a_refused_request() -> None:
    from mlflow.exceptions import MlflowException

    def trials(error: MlflowException) -> int:
        calls = []

        def work() -> None:
            calls.append(1)
            raise error

        with pytest.raises(UserError, match="refused or failed"):
            retry_unavailable(work, "http://host")
        return len(calls)

    assert trials(MlflowException("API request to http://host failed")) == len(store.WAITS) + 1
    assert trials(MlflowException.invalid_parameter_value("no such thing")) == 1


# -- the outbox under any sequence of events ---------------------------------------------------------------------------


class Store:
    """A client that keeps what a server would, and fails on request before, in or after a batch."""

    def __init__(self) -> None:
        self.points: dict[tuple[str, int, float, int], None] = {}
        self.failure: tuple[str, int] | None = None

    def get_run(self, run_id: str) -> Any:
        self._fail_if("before")
        metrics = {key: 0.0 for key, *_ in self.points}
        data = type("Data", (), {"params": {}, "metrics": metrics})
        return type("Run", (), {"data": data})

    def get_metric_history(self, run_id: str, key: str) -> list[Metric]:
        return [Metric(k, value, time, step) for k, step, value, time in self.points if k == key]

    def update_run(self, run_id: str, status: str) -> None:
        pass

    def log_batch(self, run_id: str, metrics: list[Metric], params: Any, tags: Any) -> None:
        self._fail_if("before")
        for number, m in enumerate(metrics):
            if self.failure is not None and self.failure == ("middle", number):
                self._fail_if("middle")
            self.points[m.key, m.step, m.value, m.timestamp] = None
        self._fail_if("after")

    def _fail_if(self, when: str) -> None:
        if self.failure is not None and self.failure[0] == when:
            self.failure = None
            raise ConnectionError(when)


actions = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 7)),
    st.tuples(st.just("deliver"), st.none()),
    st.tuples(st.just("fail"), st.tuples(st.sampled_from(["before", "middle", "after"]), st.integers(0, 8))),
    st.tuples(st.just("crash"), st.tuples(st.integers(0, 9), st.booleans())),
    st.tuples(st.just("restart"), st.integers(0, 9)),
)


@settings(max_examples=300, deadline=None)
@given(story=st.lists(actions, max_size=30))
def test_outbox_property_nothing_is_lost_or_doubled(
    story: list[tuple[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Points of two metrics; a crash returns to a checkpoint and may leave an incomplete record."""
    folder, server = tmp_path_factory.mktemp("outbox"), Store()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "DELIVERY_SECONDS", 3600.0)
        patch.setattr(outbox_module, "MAX_ENTRIES", 5)
        patch.setattr(threading.Thread, "start", lambda self: None)  # only the story delivers

        def opened() -> TrackedRun:
            run = TrackedRun("http://nowhere", "r", folder, resumed=True)
            run._client = server
            return run

        run, step, highest = opened(), 0, 0
        for kind, detail in story:
            if kind == "append":
                for _ in range(detail):
                    run.log({"loss": step / 7, "rate": step * 2.0}, step)
                    step += 1
            elif kind == "deliver":
                run.flush()
            elif kind == "fail":
                server.failure = detail
            else:  # a crash loses the process's memory, and may leave an incomplete record at the end of the file
                back, torn = detail if kind == "crash" else (detail, False)
                if torn:
                    with run.outbox.path.open("ab") as file:
                        file.write(json.dumps({"kind": "metric", "key": "loss", "value": 0.0}).encode()[:-7])
                step = max(0, step - back)
                run = opened()
            highest = max(highest, step)
        while step < highest:  # the steps after the last checkpoint are repeated
            run.log({"loss": step / 7, "rate": step * 2.0}, step)
            step += 1
        server.failure = None
        assert run.flush()
    for key, value in (("loss", 1 / 7), ("rate", 2.0)):
        arrived = [(s, v) for k, s, v, _ in server.points if k == key]
        assert arrived == [(s, pytest.approx(s * value)) for s in range(highest)]
    assert run.outbox.path.stat().st_size == 0 and not run.rejected.exists()
