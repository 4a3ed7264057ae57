"""The watchdog: a stalled rank and its peers end within the limit, with their stacks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from antdist.config.schema import HangConfig
from antdist.training.checkpoints.local import steps_in
from antdist.training.watchdog import HUNG
from tests.ranks import on_ranks, start_ranks
from tests.training.runs import run, run_with

PROJECT = Path(__file__).resolve().parents[2]
PATIENT = 10.0  # minutes


def limits(**minutes: float) -> HangConfig:
    return HangConfig(**{f"{phase}_minutes": minutes.get(phase, PATIENT) for phase in ("start", "step", "checkpoint")})


def start(
    size: int, data: Path, folder: Path, options: dict[str, Any], fault: dict[str, Any], errors: Path | None = None
) -> tuple[list[Any], Any]:
    """Start ranks that train together, one of which stalls."""
    faults = {"ANTDIST_FAULTS": json.dumps([{"fault": "stall", **fault}])}
    return start_ranks(size, _train, data, folder, options, environment=faults, errors=errors)


def statuses(started: tuple[list[Any], Any]) -> list[int | None]:
    """Wait for the ranks; return their exit codes."""
    ranks, _ = started
    for process in ranks:
        process.join(120)
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "a rank waits forever"
    return [process.exitcode for process in ranks]


def test_stalled_rank_dumps_stacks_and_resume_is_exact(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"noise": True, "epochs": 1, "checkpoint_every": 2}
    folder, errors = tmp_path / "stalled", tmp_path / "errors"
    stalling = start(2, data, folder, {**options, "hang": limits(step=0.03)}, {"rank": 1, "step": 5}, errors)
    straight = on_ranks(2, run_with, data, tmp_path / "straight", options)[0]  # at the same time
    assert statuses(stalling) == [HUNG, HUNG]
    assert "rank 1 made no progress for 0.03 minutes (training.hang.step_minutes): exiting" in errors.read_text()
    stalled, waiting = ((folder / "hang" / f"rank-{rank}.txt").read_text() for rank in (1, 0))
    assert "rank 1, phase step" in stalled and "in _cause" in stalled  # where the fault sleeps
    assert re.search(r"trainer\.py\", line \d+ in step\n", waiting) and "in _cause" not in waiting
    resumed = on_ranks(2, run_with, data, folder, options)[0]
    assert [step for step, _ in resumed["curve"]] == [step for step, _ in straight["curve"]][4:]
    for name, weight in straight["weights"].items():
        np.testing.assert_array_equal(resumed["weights"][name], weight, err_msg=name)


def _train(data: Path, folder: Path, options: dict[str, Any]) -> None:
    """Train without a result, which would block in the queue until it is read."""
    run(data, folder, **options)


def test_each_phase_has_its_own_limit(data: Path, tmp_path: Path) -> None:
    stalls: list[tuple[str, dict[str, Any]]] = [
        ("start", {"at": "step", "step": 0}),
        ("checkpoint", {"at": "validate"}),
        ("checkpoint", {"at": "save", "file": "moments.safetensors"}),  # in the background: the next one waits for it
    ]
    runs = [  # in parallel
        start(1, data, tmp_path / str(number), {"epochs": 1, "hang": limits(**{phase: 0.03})}, fault)
        for number, (phase, fault) in enumerate(stalls)
    ]
    for number, (phase, _) in enumerate(stalls):
        assert statuses(runs[number]) == [HUNG], phase
        assert f"rank 0, phase {phase}" in (tmp_path / str(number) / "hang" / "rank-0.txt").read_text()


def test_first_step_of_a_later_epoch_has_the_step_limit(data: Path, tmp_path: Path) -> None:
    """It starts after the checkpoint of the previous epoch, whose limit must not apply to it."""
    first = len(run(data, tmp_path / "one", epochs=1)["curve"])
    options = {"epochs": 2, "hang": limits(step=0.03)}
    assert statuses(start(1, data, tmp_path / "two", options, {"at": "step", "step": first})) == [HUNG]
    assert "rank 0, phase step" in (tmp_path / "two" / "hang" / "rank-0.txt").read_text()


FULL = """
import sys, time
from pathlib import Path
from antdist.config.schema import HangConfig
from antdist.training.watchdog import Watchdog

with Watchdog(Path(sys.argv[1]), 0, "full", HangConfig(start_minutes=0.01, step_minutes=0.01, checkpoint_minutes=0.01)):
    time.sleep(60)
"""


def test_stalled_rank_exits_if_stacks_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "hang").touch()  # in place of the folder: as on a full disk
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == HUNG and "full: rank 0 made no progress" in done.stderr


STUCK = """
import ctypes, sys
from pathlib import Path
from antdist.config.schema import HangConfig
from antdist.training.watchdog import Watchdog

limits = HangConfig(start_minutes=0.01, step_minutes=0.01, checkpoint_minutes=0.01)
with Watchdog(Path(sys.argv[1]), 0, "stuck", limits):
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock
"""


def test_stuck_interpreter_is_ended(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1 and "Timeout" in done.stderr and 'File "<string>", line 9' in done.stderr


def test_progressing_run_is_not_ended(data: Path, tmp_path: Path) -> None:
    """An epoch twice as long as a step's limit, each step far below it."""
    limit = limits(step=0.0175)
    slow = {"at": "step", "seconds": 0.4}
    assert statuses(start(1, data, tmp_path, {"epochs": 1, "hang": limit}, slow)) == [0]
    (steps,) = steps_in(tmp_path / "checkpoints")
    assert 0.4 * (steps - 1) > 1.9 * 60 * limit.step_minutes and not (tmp_path / "hang").exists()
