"""Learning rates against their closed forms."""

from __future__ import annotations

import math

import pytest

from antdist.config.schema import ScheduleConfig
from antdist.training.schedule import learning_rate


def rates(config: ScheduleConfig, steps: int = 40) -> list[float]:
    return [learning_rate(config, 0.1, step, steps_per_epoch=10, epochs=4) for step in range(steps)]


def test_reference_rate_decays_each_epoch() -> None:
    found = rates(ScheduleConfig(kind="decay", factor=0.5))
    assert found == [0.1] * 10 + [0.05] * 10 + [0.025] * 10 + [0.0125] * 10


def test_steps_at_milestones() -> None:
    found = rates(ScheduleConfig(kind="step", factor=0.1, milestones=[1, 3]))
    assert found[9] == 0.1 and found[10] == pytest.approx(0.01) and found[30] == pytest.approx(0.001)


def test_cosine_rate_after_warm_up_ends_at_the_floor() -> None:
    found = rates(ScheduleConfig(kind="cosine", warmup_steps=5, floor=0.2))
    assert found[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert found[5] == pytest.approx(0.1) and found[-1] == pytest.approx(0.02)
    middle = 0.02 + 0.08 * 0.5 * (1 + math.cos(math.pi * 17 / 34))
    assert found[22] == pytest.approx(middle)


def test_constant_rate() -> None:
    assert set(rates(ScheduleConfig(kind="constant"))) == {0.1}
