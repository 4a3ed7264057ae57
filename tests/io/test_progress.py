"""Progress of anything long: every element comes through, and a log has a line now and then, not one an element."""

from __future__ import annotations

import itertools
import time

import pytest

from antdist.io.progress import track


@pytest.mark.parametrize(
    ("total", "told"),
    [
        (9, ["reading: 3 of 9, 0.2/s, 32 s left", "reading: 7 of 9, 0.2/s, 9 s left"]),
        (None, ["reading: 3, 0.2/s", "reading: 7, 0.2/s"]),
    ],
)
def test_a_log_has_a_line_every_15_seconds(
    total: int | None, told: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An element each four seconds."""
    clock = itertools.count(0.0, 4.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(track(range(9), "reading", total)) == list(range(9))
    assert capsys.readouterr().err.splitlines() == told


def test_progress_counts_sizes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(track([600, 200, 100], "users scored", 900, size=lambda users: users)) == [600, 200, 100]
    assert capsys.readouterr().err.splitlines() == ["users scored: 600 of 900, 30.0/s, 10 s left"]


@pytest.mark.parametrize("total", [900, None])
def test_a_terminal_has_a_bar(
    total: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    seen = []
    for users in track([600, 300], "users scored", total, size=lambda users: users):
        time.sleep(0.15)  # it is drawn ten times a second
        seen.append(users)
    assert seen == [600, 300] and "users scored" in capsys.readouterr().err
