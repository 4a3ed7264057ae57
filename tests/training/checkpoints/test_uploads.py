"""Copies to other storage: training never waits for them, failures are told and made up for, the last one is waited for."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from antdist import faults
from antdist.training import trainer as loop
from antdist.training.checkpoints import uploads
from antdist.training.checkpoints.local import steps_in
from antdist.training.checkpoints.remote import Remote
from antdist.training.checkpoints.uploads import Uploads
from tests.training.checkpoints.test_remote import save
from tests.training.test_trainer import NAMES, assert_same, run
from tests.worlds import make_domains


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_domains(folder, NAMES)
    return folder


class Flaky(MemoryFileSystem):
    """Memory whose writes fail as often as `failures` says, and wait until it is opened."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures = 0
    failed: ClassVar[list[str]] = []
    entered, gate = threading.Event(), threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("flaky://"))

    def put_file(self, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
        self.entered.set()
        self.gate.wait()
        if type(self).failures > 0:
            type(self).failures -= 1
            self.failed.append(rpath)
            raise OSError("the network is down")
        super().put_file(lpath, rpath, *arguments, **options)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URI of it."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(uploads, "FIRST_PAUSE", 0.01)
    Flaky.failed.clear()
    Flaky.gate.set()
    yield f"flaky://{uuid.uuid4()}"
    Flaky.failures = 0
    Flaky.gate.set()


def test_copies_that_fail_cost_training_nothing_and_a_later_one_arrives(
    data: Path, tmp_path: Path, flaky: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"noise": True, "checkpoint_every": 1}
    straight = run(data, tmp_path / "straight", **options)
    capsys.readouterr()
    Flaky.failures = 3
    done = run(data, tmp_path / "a", **options, remote=flaky)
    assert_same(straight, done)
    assert len(Flaky.failed) == 3
    last = steps_in(tmp_path / "a" / "checkpoints")[-1]
    assert last == len(straight["curve"]) == Remote(flaky).steps()[-1]
    told = capsys.readouterr().err
    assert told.count("is not copied yet, training goes on: ") == 3 and "(the network is down)" in told
    assert f"has reached {flaky}" in told


def test_training_goes_on_while_a_copy_stalls_whose_files_stay_and_then_the_newest_is_copied(
    data: Path, tmp_path: Path, flaky: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first copy begins to write once the last step is done; meanwhile its checkpoint is far from the newest two."""
    step, seen = loop.train_step, list[list[int]]()

    def told(job: loop.Job, step_input: Any) -> Any:
        if step_input.step == 2:
            assert Flaky.entered.wait(60)
        if step_input.step == 6:
            seen.append(steps_in(tmp_path / "a" / "checkpoints"))
            Flaky.gate.set()
        return step(job, step_input)

    Flaky.gate.clear()
    Flaky.entered.clear()
    monkeypatch.setattr(loop, "train_step", told)
    run(data, tmp_path / "a", checkpoint_every=1, stop_after=7, remote=flaky)
    ((copying, *newest),) = seen
    assert copying in (1, 2) and newest[-2:] in ([4, 5], [5, 6]), seen
    assert Remote(flaky).steps()[-1] == 7
    run(data, tmp_path / "a", checkpoint_every=1, stop_after=2, remote=flaky)
    assert copying not in steps_in(tmp_path / "a" / "checkpoints"), "held for ever"


def test_the_end_waits_for_the_last_copy_no_longer_than_it_may_and_the_same_command_makes_up_for_it(
    data: Path, tmp_path: Path, flaky: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Flaky.failures = 10**9
    hang = {"start_minutes": 0.05, "step_minutes": 1.0, "checkpoint_minutes": 1.0}
    progress = run(data, tmp_path / "a", epochs=1, hang=hang, remote=flaky)["progress"]
    assert progress.finished == "all epochs done"
    told = capsys.readouterr().err
    assert (
        f"the last checkpoint did not reach {flaky} in 0.025 minutes; it is whole in {tmp_path}/a/checkpoints" in told
    )
    for thread in threading.enumerate():
        if thread.name == "uploads":  # it gives up too
            thread.join(60)
    Flaky.failures = 0
    assert Remote(flaky).steps() == []
    run(data, tmp_path / "a", epochs=1, remote=flaky)
    assert Remote(flaky).steps() == [progress.step]


def test_the_end_waits_for_the_last_copy(tmp_path: Path, flaky: str) -> None:
    save(tmp_path, 2)
    Flaky.gate.clear()
    with Uploads(Remote(flaky), tmp_path, 2, None, 60.0):
        threading.Timer(0.2, Flaky.gate.set).start()
    assert Remote(flaky).steps() == [2]


def test_a_drill_may_fail_a_copy(
    tmp_path: Path, flaky: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [{"fault": "full", "at": "upload", "step": 2, "file": "COMPLETE.json", "once": str(tmp_path / "once")}]
    monkeypatch.setenv(faults.VARIABLE, json.dumps(wanted))
    save(tmp_path, 2)
    with Uploads(Remote(flaky), tmp_path, 2, None, 60.0):
        pass
    assert Remote(flaky).steps() == [2]
    assert "the checkpoint of step 2 is not copied yet, training goes on: [Errno 28]" in capsys.readouterr().err


def test_the_last_copy_is_waited_for_when_an_error_ends_the_training(data: Path, tmp_path: Path, flaky: str) -> None:
    with pytest.raises(StopIteration):
        run(data, tmp_path / "a", recalls=[], checkpoint_every=2, remote=flaky)
    assert Remote(flaky).steps()[-1] == steps_in(tmp_path / "a" / "checkpoints")[-1]
    assert not [thread for thread in threading.enumerate() if thread.name == "uploads"]


def test_a_mistake_of_ours_is_raised_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote(str(tmp_path / "there"))
    monkeypatch.setattr(remote, "upload", lambda *_: 1 / 0)
    save(tmp_path, 2)
    with pytest.raises(ZeroDivisionError), Uploads(remote, tmp_path, 2, None, 5.0):
        pass
