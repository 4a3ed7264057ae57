"""Signals to stop or to save: all ranks follow after the same step, and the resumed run is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antdist.distributed.world import current_world
from antdist.errors import Preempted
from antdist.training.checkpoints.local import steps_in
from antdist.training.signals import Signal
from tests.ranks import on_ranks
from tests.training.runs import assert_same, run, run_with


def signal_at(point: int, signal: Signal, rank: int = 0) -> Callable[[], Signal | None]:
    """Send a signal to one rank, once, at that point of the curve."""
    points = 0

    def poll_signal() -> Signal | None:
        nonlocal points
        points += 1
        return signal if points == point and current_world().rank == rank else None

    return poll_signal


def stopped(data: Path, folder: Path, options: dict[str, Any], at: tuple[Any, ...]) -> str:
    with pytest.raises(Preempted) as caught:
        run(data, folder, poll_signal=signal_at(*at), **options)
    return str(caught.value)


def test_stop_signal_on_one_rank_stops_all_and_resume_is_exact(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"noise": True, "epochs": 2, "log_every": 2}
    straight = on_ranks(2, run_with, data, tmp_path / "straight", options)[0]
    messages = on_ranks(2, stopped, data, tmp_path / "a", options, (2, "stop", 1))
    assert messages == ["training: stopped after step 4; run the same command to continue"] * 2
    assert steps_in(tmp_path / "a" / "checkpoints") == [4]
    resumed = on_ranks(2, run_with, data, tmp_path / "a", options)[0]
    assert_same({**straight, "curve": straight["curve"][2:]}, resumed)
    assert resumed["history"] == straight["history"]


def test_stop_at_epoch_end_leaves_validation_to_the_resume(data: Path, tmp_path: Path) -> None:
    straight = run(data, tmp_path / "straight", epochs=2)
    steps = len(straight["curve"]) // 2
    with pytest.raises(Preempted, match=f"stopped after step {steps}; run the same"):
        run(
            data, tmp_path / "a", epochs=2, poll_signal=signal_at(steps, "stop"), recalls=[]
        )  # a validation would raise
    resumed = run(data, tmp_path / "a", epochs=2)
    assert_same({**straight, "curve": straight["curve"][steps:]}, resumed)
    assert resumed["history"] == straight["history"] and len(straight["history"]) == 2


def test_save_signal_saves_and_training_continues(data: Path, tmp_path: Path) -> None:
    straight = run(data, tmp_path / "straight", epochs=1, noise=True)
    saved = run(data, tmp_path / "a", epochs=1, noise=True, poll_signal=signal_at(3, "save"), keep_checkpoints=9)
    assert_same(straight, saved)
    assert steps_in(tmp_path / "a" / "checkpoints")[0] == 3
    last = steps_in(tmp_path / "a" / "checkpoints")[-1]
    for name in ("weights.safetensors", "moments.safetensors"):
        ours, theirs = (tmp_path / f / "checkpoints" / f"step-{last:08d}" / name for f in ("a", "straight"))
        assert np.array_equal(np.frombuffer(ours.read_bytes(), np.uint8), np.frombuffer(theirs.read_bytes(), np.uint8))
