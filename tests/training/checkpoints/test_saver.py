"""Background saves: snapshots of their own step, in order, atomic; every failure is raised."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antdist.config.schema import TrainingConfig
from antdist.errors import UserError
from antdist.training.checkpoints import saver as saver_module
from antdist.training.checkpoints.local import best_weights, load_latest, steps_in
from antdist.training.checkpoints.saver import Saver
from antdist.training.feed import StepInput
from antdist.training.trainer import Trainer
from tests.ranks import on_ranks
from tests.training.runs import assert_same, run

PROJECT = Path(__file__).resolve().parents[3]


def test_training_continues_while_a_save_stalls(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save of step 2 is written only after step 4; its files are those of a run stopped at 2."""
    options: dict[str, Any] = {"noise": True, "epochs": 1, "checkpoint_every": 2, "keep_checkpoints": 20}
    run(data, tmp_path / "stopped", **options, stop_after=2)
    fourth = threading.Event()
    save, step = saver_module.save_checkpoint, Trainer.step

    def late(parent: Path, at: int, *arguments: Any) -> Path:
        assert fourth.wait(60), "training waits for the save"
        return save(parent, at, *arguments)

    def report(trainer: Trainer, step_input: StepInput) -> Any:
        losses = step(trainer, step_input)
        if step_input.step == 3:
            fourth.set()
        return losses

    monkeypatch.setattr(saver_module, "save_checkpoint", late)
    monkeypatch.setattr(Trainer, "step", report)
    run(data, tmp_path / "straight", **options)
    for name in ("weights.safetensors", "moments.safetensors"):
        mine, theirs = (
            (tmp_path / folder / "checkpoints" / "step-00000002" / name).read_bytes()
            for folder in ("straight", "stopped")
        )
        assert mine == theirs, name
    fourths = (tmp_path / "straight" / "checkpoints" / "step-00000004" / "weights.safetensors").read_bytes()
    assert fourths != (tmp_path / "straight" / "checkpoints" / "step-00000002" / "weights.safetensors").read_bytes()


def test_best_weights_are_saved_before_their_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, seen = saver_module.save_checkpoint, []

    def check(parent: Path, step: int, state: Any, document: dict[str, Any], *keep: int | None) -> Path:
        best = document["progress"]["best_epoch"]
        seen.append(best)
        assert best is None or best_weights(parent.parent, best).is_file()
        folder = save(parent, step, state, document, *keep)
        assert best is None or best_weights(parent.parent, best).is_file()
        return folder

    monkeypatch.setattr(saver_module, "save_checkpoint", check)
    run(data, tmp_path / "a", epochs=3, recalls=[0.1, 0.05, 0.2], checkpoint_every=2)
    assert set(seen) == {None, 1, 3}
    kept = {path.name for path in (tmp_path / "a" / "best").iterdir()}
    assert "epoch-00003.safetensors" in kept


def test_best_weights_are_those_of_their_epoch(data: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    after_one = run(data, tmp_path / "a", noise=True, epochs=1)
    run(data, tmp_path / "b", noise=True, epochs=3, recalls=[0.1, 0.05, 0.05])
    best = load_file(best_weights(tmp_path / "b", 1))
    assert best.keys() == after_one["weights"].keys()
    for name, value in after_one["weights"].items():
        np.testing.assert_array_equal(best[name], value, err_msg=name)


def test_pending_save_completes_after_an_error(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = saver_module.save_checkpoint

    def slow(*arguments: Any) -> Path:
        time.sleep(0.5)
        return save(*arguments)

    monkeypatch.setattr(saver_module, "save_checkpoint", slow)
    with pytest.raises(StopIteration):
        run(data, tmp_path / "a", recalls=[], checkpoint_every=2)
    found = load_latest(tmp_path / "a" / "checkpoints")
    assert found is not None and found.folder.name == f"step-{steps_in(tmp_path / 'a' / 'checkpoints')[-1]:08d}"
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("saver")] == []


def full_disk(data: Path, folder: Path, **options: Any) -> tuple[str, list[int]]:
    """Run on a disk with space for small files only; return the error and the complete checkpoints."""
    import resource

    run(data, folder, stop_after=2, epochs=2, keep_checkpoints=9)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            run(data, folder, epochs=2, keep_checkpoints=9, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return str(caught.value), steps_in(folder / "checkpoints")


@pytest.mark.parametrize("when", ["at the next save", "at the end"])
def test_full_disk_raises_on_all_ranks_and_keeps_checkpoints(data: Path, tmp_path: Path, when: str) -> None:
    options = {"checkpoint_every": 1} if when == "at the next save" else {"stop_after": 1}
    for message, steps in on_ranks(2, _full_disk, data, tmp_path / "a", options):
        assert "checkpoints/.writing-step-00000003/weights.safetensors: a checkpoint cannot be written" in message
        assert "File too large" in message and "resumes from the last complete checkpoint" in message
        assert steps == [2]
    resumed, straight = run(data, tmp_path / "a", epochs=2), run(data, tmp_path / "b", epochs=2)
    assert_same({**straight, "curve": straight["curve"][2:]}, resumed, 1e-5)
    assert not list((tmp_path / "a" / "checkpoints").glob(".writing-*")), "not removed"


def _full_disk(data: Path, folder: Path, options: dict[str, Any]) -> tuple[str, list[int]]:
    return full_disk(data, folder, **options)


# arguments: data, folder, and the flush of a save (weights, moments, progress, marker, folder) at which to die
KILLED = """
import os, signal, sys, threading
from pathlib import Path
from antdist.io import files
from antdist.training.checkpoints import local as checkpoint
from tests.training.runs import run

flush, flushed, fatal = checkpoint.flush_to_disk, [], int(sys.argv[3])

def flush_or_die(path):
    if ".writing-step-00000005" in str(path):
        assert threading.current_thread() is not threading.main_thread(), "not in the background"
        flushed.append(path)
        if len(flushed) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
    flush(path)

checkpoint.flush_to_disk = files.flush_to_disk = flush_or_die
run(Path(sys.argv[1]), Path(sys.argv[2]), noise=True, checkpoint_every=1)
"""


@pytest.mark.parametrize("flush", [2, 5])
def test_resume_after_kill_during_save_is_bit_for_bit(data: Path, tmp_path: Path, flush: int) -> None:
    """Laws 3 and 6; the fifth step is saved while the sixth runs."""
    straight = run(data, tmp_path / "straight", noise=True, checkpoint_every=1)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, data, tmp_path / "killed", str(flush)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -9, done.stderr
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert steps_in(checkpoints) == [3, 4] and (checkpoints / ".writing-step-00000005").is_dir()
    resumed = run(data, tmp_path / "killed", noise=True, checkpoint_every=1)
    assert_same({**straight, "curve": straight["curve"][4:]}, resumed)
    assert resumed["history"] == straight["history"]


def test_save_failure_is_reported_once_and_bugs_are_raised(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "w"))

    with Saver(tmp_path, TrainingConfig()) as saver:
        saver.begin(full)
        assert str(saver.wait()).startswith(
            f"{tmp_path / 'w'}: a checkpoint cannot be written (No space left on device)."
        )
        assert saver.wait() is None
    with pytest.raises(UserError, match="No space left"), Saver(tmp_path, TrainingConfig()) as saver:
        saver.begin(full)
    with pytest.raises(ZeroDivisionError), Saver(tmp_path, TrainingConfig()) as saver:
        saver.begin(lambda: print(1 / 0))


def test_save_failure_does_not_hide_the_original_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "w"))

    with pytest.raises(KeyboardInterrupt), Saver(tmp_path, TrainingConfig()) as saver:
        saver.begin(full)
        raise KeyboardInterrupt
    assert "another failure: " in capsys.readouterr().err
