"""Fault injection: off by default; on, only at the configured place, rank and step, and logged."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from antdist import faults
from antdist.errors import UserError


def configure(patch: pytest.MonkeyPatch, *wanted: dict[str, Any]) -> None:
    patch.setenv(faults.VARIABLE, json.dumps(wanted))
    faults.parse.cache_clear()


def test_nothing_happens_by_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    assert faults.inject("step", rank=0, step=0) is False and faults.worker_environment() == {}
    assert capsys.readouterr().err == ""


def test_a_fault_is_logged_and_happens_only_at_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(monkeypatch, {"fault": "nan", "at": "loss", "rank": 1, "step": 3}, {"fault": "raise", "at": "validate"})
    assert faults.inject("loss", rank=1, step=3) is True
    told = capsys.readouterr().err
    assert "ANTDIST_FAULTS IS SET: THIS PROCESS INJECTS FAULTS ON PURPOSE" in told
    assert "nan at loss (rank 1, step 3)" in told
    for place, rank, step in (("loss", 0, 3), ("loss", 1, 2), ("step", 1, 3)):
        assert faults.inject(place, rank=rank, step=step) is False
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError, match="a fault injected by ANTDIST_FAULTS"):
        faults.inject("validate", rank=0, step=9)
    assert faults.worker_environment()[faults.VARIABLE]


def test_a_full_disk_a_stall_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    once = tmp_path / "done"
    configure(monkeypatch, {"fault": "full", "at": "save", "file": "COMPLETE.json", "once": str(once)})
    with pytest.raises(OSError, match="No space left on device"):
        faults.inject("save", rank=0, step=1, file="COMPLETE.json")
    assert once.is_file() and faults.inject("save", rank=0, step=1, file="COMPLETE.json") is False
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    configure(monkeypatch, {"fault": "stall", "rank": 0, "seconds": 7}, {"fault": "stall", "rank": 1})
    faults.inject("step", rank=0, step=1)
    faults.inject("step", rank=1, step=1)
    assert slept == [7, faults.STALL_SECONDS]


def test_a_fault_after_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.0, 104.9, 105.0])
    monkeypatch.setattr(faults, "_started", [])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    configure(monkeypatch, {"fault": "nan", "at": "loss", "after": 5})
    assert [faults.inject("loss", rank=0, step=k) for k in range(3)] == [False, False, True]


def test_a_kill_is_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, {"fault": "kill", "step": 2})
    code = "from antdist import faults; [faults.inject('step', rank=0, step=k) or print(k) for k in range(4)]"
    done = subprocess.run([sys.executable, "-u", "-c", code], capture_output=True, text=True)
    assert done.returncode == -9 and done.stdout.split() == ["0", "1"], done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "ANTDIST_FAULTS: not JSON"),
        ("{}", "not a list of faults"),
        ('[{"fault": "melt"}]', "unknown fault 'melt'; known: kill, stall"),
        ('[{"fault": "kill", "at": "noon"}]', "unknown place 'noon'"),
        ('[{"fault": "kill", "when": 3}]', "unknown key when"),
    ],
)
def test_malformed_faults_are_refused(monkeypatch: pytest.MonkeyPatch, text: str, told: str) -> None:
    monkeypatch.setenv(faults.VARIABLE, text)
    with pytest.raises(UserError, match=told):
        faults.inject("step", rank=0, step=0)
    with pytest.raises(UserError, match=told):
        faults.worker_environment()


def test_corrupt_flips_cuts_and_removes(tmp_path: Path) -> None:
    file, content = tmp_path / "f", bytes(range(100))
    file.write_bytes(content)
    faults.corrupt(file, "flip")
    differing = [a ^ b for a, b in zip(file.read_bytes(), content, strict=True) if a != b]
    assert differing == [1]
    faults.corrupt(file, "cut")
    assert file.read_bytes() == content[:50]
    faults.corrupt(file, "gone")
    assert not file.exists()
