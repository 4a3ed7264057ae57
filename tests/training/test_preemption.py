"""Asked to stop or to save, by any rank: all do, after the same step, and the run that goes on is the run without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antdist.distributed.world import current_world
from antdist.errors import Preempted
from antdist.training.checkpoints.local import steps_in
from antdist.training.trainer import Asked
from tests.ranks import on_ranks
from tests.training.test_trainer import NAMES, assert_same, run
from tests.worlds import make_domains


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_domains(folder, NAMES)
    return folder


def asking(what: Asked, point: int, rank: int = 0) -> Callable[[], Asked]:
    """Asks so on one rank, once, at that point of the curve."""
    points = 0

    def asked() -> Asked:
        nonlocal points
        points += 1
        return what if points == point and current_world().rank == rank else None

    return asked


def stopped(data: Path, folder: Path, options: dict[str, Any], ask: tuple[Any, ...]) -> str:
    with pytest.raises(Preempted) as told:
        run(data, folder, asked=asking(*ask), **options)
    return str(told.value)


def _run(data: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    return run(data, folder, **options)


def test_what_one_rank_is_asked_stops_all_and_the_resume_is_exact(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"noise": True, "epochs": 2, "log_every": 2}
    straight = on_ranks(2, _run, data, tmp_path / "straight", options)[0]
    told = on_ranks(2, stopped, data, tmp_path / "a", options, ("stop", 2, 1))
    assert told == ["training: stopped after step 4, as asked; the same command goes on"] * 2
    assert steps_in(tmp_path / "a" / "checkpoints") == [4]
    resumed = on_ranks(2, _run, data, tmp_path / "a", options)[0]
    assert_same({**straight, "curve": straight["curve"][2:]}, resumed)
    assert resumed["history"] == straight["history"]


def test_asked_at_an_epochs_end_the_validation_is_the_resumes(data: Path, tmp_path: Path) -> None:
    straight = run(data, tmp_path / "straight", epochs=2)
    steps = len(straight["curve"]) // 2
    with pytest.raises(Preempted, match=f"stopped after step {steps}, as asked"):
        run(data, tmp_path / "a", epochs=2, asked=asking("stop", steps), recalls=[])  # a validation would raise
    resumed = run(data, tmp_path / "a", epochs=2)
    assert_same({**straight, "curve": straight["curve"][steps:]}, resumed)
    assert resumed["history"] == straight["history"] and len(straight["history"]) == 2


def test_asked_to_save_a_run_does_and_goes_on(data: Path, tmp_path: Path) -> None:
    straight = run(data, tmp_path / "straight", epochs=1, noise=True)
    saved = run(data, tmp_path / "a", epochs=1, noise=True, asked=asking("save", 3), keep_checkpoints=9)
    assert_same(straight, saved)
    assert steps_in(tmp_path / "a" / "checkpoints")[0] == 3
    last = steps_in(tmp_path / "a" / "checkpoints")[-1]
    for name in ("weights.safetensors", "moments.safetensors"):
        ours, theirs = (tmp_path / f / "checkpoints" / f"step-{last:08d}" / name for f in ("a", "straight"))
        assert np.array_equal(np.frombuffer(ours.read_bytes(), np.uint8), np.frombuffer(theirs.read_bytes(), np.uint8))
