"""Kills at any moment: the resumed run sees the same users and ends bit for bit alike (law 3)."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antdist.data.domain import open_domain
from antdist.faults import Fault
from benchmarks.drill import DrillRun, end_state, final_steps, finish, read_ledger, start
from benchmarks.worlds import Shape, write_world

FILES = ("weights.safetensors", "moments.safetensors", "progress.json", "COMPLETE.json", "rename", "prune")


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("data"), Shape(80, 50, 7.0), block_users=8).folder


def drill(run: DrillRun, ranks: int, attempts: list[list[Fault]]) -> list[list[int]]:
    """Start the run per attempt with its faults, then once without; return the exit codes."""
    return [finish(start(run, ranks, number, wanted)) for number, wanted in enumerate([*attempts, []])]


def assert_nothing_lost(run: DrillRun, straight: DrillRun) -> None:
    """Check the final state bit for bit, and by the ledger the steps and each epoch's users."""
    mine, theirs = end_state(run), end_state(straight)
    assert mine.keys() == theirs.keys()
    for name, content in theirs.items():
        assert mine[name] == content, f"{name} differs"
    steps, others = final_steps(run), final_steps(straight)
    assert sorted(steps) == sorted(others) == list(range(len(steps)))
    for step, ranks in steps.items():
        assert [(line.users, line.mine) for line in ranks] == [(line.users, line.mine) for line in others[step]]
    assert_each_user_once(run)


def assert_each_user_once(run: DrillRun) -> None:
    """Check that each epoch predicts every target once, and that the ranks partition each batch."""
    lengths = np.diff(open_domain(run.domain).sequences().offsets)
    wanted = {user: int(length) - 3 for user, length in enumerate(lengths) if length > 3}
    epochs: dict[int, Counter[int]] = {}
    for ranks in final_steps(run).values():
        leader = ranks[0]
        ledger = epochs.setdefault(leader.epoch, Counter())
        for user, predictions in zip(leader.users, leader.predictions, strict=True):
            ledger[user] += predictions
        assert Counter(window for line in ranks for window in line.mine) == Counter(leader.windows)
    assert sorted(epochs) == list(range(run.epochs))
    for epoch, ledger in epochs.items():
        assert ledger == wanted, f"epoch {epoch}"


@pytest.mark.parametrize(
    ("kind", "ranks"), [("pretraining", 1), ("pretraining", 2), ("pretraining", 3), ("adaptation", 2)]
)
def test_resume_after_kills_sees_every_user_exactly_once(domain: Path, tmp_path: Path, kind: Any, ranks: int) -> None:
    straight = DrillRun(domain, tmp_path / "straight", kind)
    assert drill(straight, ranks, []) == [[0] * ranks]
    total = len(final_steps(straight))
    assert total >= 18
    choice = random.Random(f"{kind} {ranks}")
    attempts: list[list[Fault]] = []
    for third in range(3):  # early, in the middle, late; between steps, and in the middle of a save
        first = 1 + third * total // 3
        step = choice.randrange(first, first + total // 3 - 3)
        attempts.append([{"fault": "kill", "rank": choice.randrange(ranks), "step": step}])
        save = 3 * (step // 3) + 3
        attempts.append([{"fault": "kill", "at": "save", "step": save, "file": choice.choice(FILES)}])
    run = DrillRun(domain, tmp_path / "killed", kind)
    codes = drill(run, ranks, attempts)
    for faults, ended in zip(attempts, codes, strict=False):
        assert ended[faults[0].get("rank", 0)] == -9, (faults, ended)
    assert codes[-1] == [0] * ranks
    repeated = len(list(read_ledger(run))) - sum(map(len, final_steps(run).values()))
    assert repeated > 0, "no step was undone: the kills had no effect"
    assert_nothing_lost(run, straight)
