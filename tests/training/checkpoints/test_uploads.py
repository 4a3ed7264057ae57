"""Background uploads: training does not wait, failures are retried, the last one is awaited."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from antdist import faults
from antdist.training.checkpoints import uploads
from antdist.training.checkpoints.local import steps_in
from antdist.training.checkpoints.remote import Remote
from antdist.training.checkpoints.uploads import Uploads
from antdist.training.feed import StepInput
from antdist.training.trainer import Trainer
from tests.training.checkpoints.test_remote import save
from tests.training.runs import assert_same, run


class Flaky(MemoryFileSystem):
    """A memory file system whose writes fail `failures` times, and wait for `gate`."""

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
    """Return a URI of a `Flaky` file system."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(uploads, "FIRST_PAUSE", 0.01)
    Flaky.failed.clear()
    Flaky.gate.set()
    yield f"flaky://{uuid.uuid4()}"
    Flaky.failures = 0
    Flaky.gate.set()


def test_failed_uploads_do_not_affect_training(
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
    log = capsys.readouterr().err
    assert log.count("is not uploaded yet, training continues: ") == 3 and "(the network is down)" in log
    assert re.search(rf"uploaded the checkpoint of step \d+ to {flaky}", log)


def test_stalled_upload_keeps_its_files_until_done(
    data: Path, tmp_path: Path, flaky: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first upload is written after the last step, when newer checkpoints exist."""
    step, seen = Trainer.step, list[list[int]]()

    def check(trainer: Trainer, step_input: StepInput) -> Any:
        if step_input.step == 2:
            assert Flaky.entered.wait(60)
        if step_input.step == 6:
            seen.append(steps_in(tmp_path / "a" / "checkpoints"))
            Flaky.gate.set()
        return step(trainer, step_input)

    Flaky.gate.clear()
    Flaky.entered.clear()
    monkeypatch.setattr(Trainer, "step", check)
    run(data, tmp_path / "a", checkpoint_every=1, stop_after=7, remote=flaky)
    ((uploading, *newest),) = seen
    assert uploading in (1, 2) and newest[-2:] in ([4, 5], [5, 6]), seen
    assert Remote(flaky).steps()[-1] == 7
    run(data, tmp_path / "a", checkpoint_every=1, stop_after=2, remote=flaky)
    assert uploading not in steps_in(tmp_path / "a" / "checkpoints"), "never removed"


def test_last_upload_times_out_and_the_next_run_repeats_it(
    data: Path, tmp_path: Path, flaky: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Flaky.failures = 10**9
    hang = {"start_minutes": 0.05, "step_minutes": 1.0, "checkpoint_minutes": 1.0}
    progress = run(data, tmp_path / "a", epochs=1, hang=hang, remote=flaky)["progress"]
    assert progress.finished == "all epochs done"
    log = capsys.readouterr().err
    assert f"the last checkpoint was not uploaded to {flaky} within 0.025 minutes" in log
    assert f"it is complete in {tmp_path}/a/checkpoints" in log
    for thread in threading.enumerate():
        if thread.name == "uploads":  # it ends soon, too
            thread.join(60)
    Flaky.failures = 0
    assert Remote(flaky).steps() == []
    run(data, tmp_path / "a", epochs=1, remote=flaky)
    assert Remote(flaky).steps() == [progress.step]


def test_exit_waits_for_the_last_upload(tmp_path: Path, flaky: str) -> None:
    save(tmp_path, 2)
    Flaky.gate.clear()
    with Uploads(Remote(flaky), tmp_path, 2, None, 60.0):
        threading.Timer(0.2, Flaky.gate.set).start()
    assert Remote(flaky).steps() == [2]


def test_injected_fault_fails_an_upload(
    tmp_path: Path, flaky: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [{"fault": "full", "at": "upload", "step": 2, "file": "COMPLETE.json", "once": str(tmp_path / "once")}]
    monkeypatch.setenv(faults.VARIABLE, json.dumps(wanted))
    save(tmp_path, 2)
    with Uploads(Remote(flaky), tmp_path, 2, None, 60.0):
        pass
    assert Remote(flaky).steps() == [2]
    assert "the checkpoint of step 2 is not uploaded yet, training continues: [Errno 28]" in capsys.readouterr().err


def test_exit_waits_for_the_last_upload_after_an_error(data: Path, tmp_path: Path, flaky: str) -> None:
    with pytest.raises(StopIteration):
        run(data, tmp_path / "a", recalls=[], checkpoint_every=2, remote=flaky)
    assert Remote(flaky).steps()[-1] == steps_in(tmp_path / "a" / "checkpoints")[-1]
    assert not [thread for thread in threading.enumerate() if thread.name == "uploads"]


def test_upload_bug_is_raised_at_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote(str(tmp_path / "there"))
    monkeypatch.setattr(remote, "upload", lambda *_: 1 / 0)
    save(tmp_path, 2)
    with pytest.raises(ZeroDivisionError), Uploads(remote, tmp_path, 2, None, 5.0):
        pass
