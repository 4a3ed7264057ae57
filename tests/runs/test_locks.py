"""One command and one leading worker at a time work in a run's folder."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from antdist.errors import UserError
from antdist.io.logs import get_logger
from antdist.runs import locks
from antdist.runs.folder import RunFolder
from antdist.runs.follow import lead
from antdist.runs.locks import lock_run

logger = get_logger("antdist.tests")


@contextlib.contextmanager
def refused(message: str = "another command is working on this run") -> Iterator[None]:
    with pytest.raises(UserError, match=message):
        yield


def test_a_second_command_on_the_same_run_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with (
        lock_run(run),
        lock_run(RunFolder(tmp_path / "other")),
        refused("run: another command is working on this run"),
        lock_run(run),
    ):
        pass
    with lock_run(run):
        pass


def test_trials_of_a_run_are_locked_apart_and_the_run_as_a_whole(tmp_path: Path) -> None:
    run, one, other = (RunFolder(tmp_path / name) for name in ("run", "run/one", "run/other"))
    with lock_run(run, [one], shared=True):
        with lock_run(run, [other], shared=True):
            pass
        with refused("run/one: another command is working on this trial"), lock_run(run, [one], shared=True):
            pass
        with refused("run: another command is working on this run"), lock_run(run, [one, other]):
            pass
    with lock_run(run, [one, other]), refused(), lock_run(run, [one], shared=True):
        pass


@pytest.mark.parametrize(
    ("working", "shared"),
    [("one", False), ("one", True), (".", True)],
    ids=["trial-then-run", "trial-then-trial", "run-then-trial"],
)
def test_a_command_waits_for_workers_of_trial_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, working: str, shared: bool
) -> None:
    monkeypatch.setattr(locks, "EARLIER_WORKERS_SECONDS", 0.1)
    (tmp_path / "one").mkdir()
    trials = [RunFolder(tmp_path / "one")]
    with (
        lead(RunFolder(tmp_path / working)),
        refused("earlier workers of this run are still at work"),
        lock_run(RunFolder(tmp_path), trials, shared=shared),
    ):
        pass


HOLDING = """
import sys, time
from pathlib import Path
from antdist.runs.folder import RunFolder
from antdist.runs.follow import lead
from antdist.runs.locks import lock_run
folder = RunFolder(Path(sys.argv[1]))
with lock_run(folder):
    print("locked", flush=True)
    with lead(folder):
        print("leading", flush=True)
        time.sleep(600)
"""


def test_a_killed_command_leaves_no_lock(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path], stdout=subprocess.PIPE, text=True)
    folder = RunFolder(tmp_path)
    try:
        assert first.stdout is not None and first.stdout.readline() == "locked\n"
        assert first.stdout.readline() == "leading\n"
        with refused(), lock_run(folder):
            pass
    finally:
        first.kill()
        first.wait()
    with lock_run(folder), lead(folder):
        pass


def test_a_command_waits_for_workers_of_a_killed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They write to the outbox that the next command's driver opens."""
    monkeypatch.setattr(locks, "EARLIER_WORKERS_SECONDS", 0.1)
    folder = RunFolder(tmp_path)
    with lead(folder), refused("earlier workers of this run are still at work"), lock_run(folder):
        pass
    with lock_run(folder):
        pass


def test_a_leader_waits_for_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, order = RunFolder(tmp_path), []
    entered, leave = threading.Event(), threading.Event()

    def earlier() -> None:
        with lead(folder):
            entered.set()
            leave.wait()
            order.append("earlier ends")

    thread = threading.Thread(target=earlier)
    thread.start()
    entered.wait()
    monkeypatch.setattr(locks, "EARLIER_WORKERS_SECONDS", 0.1)
    with refused("earlier workers of this run are still at work"), lead(folder):
        pass
    monkeypatch.setattr(locks, "EARLIER_WORKERS_SECONDS", 20.0)
    monkeypatch.setattr(locks, "REPORT_SECONDS", 0.1)
    threading.Timer(0.5, leave.set).start()
    with lead(folder):
        order.append("later begins")
        logger.info("here")
    thread.join()
    assert order == ["earlier ends", "later begins"]
    logged = folder.log_file.read_text().splitlines()
    assert logged[-1] == "here"
    assert logged[-2].endswith("earlier workers of this run are still at work: waiting until they have ended")


def test_a_free_folder_is_locked_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with lead(RunFolder(tmp_path)):
        assert time.monotonic() - start < 0.2
