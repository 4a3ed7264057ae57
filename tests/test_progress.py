"""Progress of anything long: every element comes through, and a log has a line now and then, not one an element."""

from __future__ import annotations

import itertools
import time

import pytest

from antdist.progress import track


@pytest.mark.parametrize(
    ("total", "told"),
    [
        (9, ["reading: 3 of 9, 0.2/s, 32 s left", "reading: 7 of 9, 0.2/s, 9 s left"]),
        (None, ["reading: 3, 0.2/s", "reading: 7, 0.2/s"]),
    ],
)
def test_a_log_has_a_line_each_quarter_of_a_minute(
    total: int | None, told: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An element each four seconds."""
    clock = itertools.count(0.0, 4.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(track(range(9), "reading", total)) == list(range(9))
    assert capsys.readouterr().err.splitlines() == told
