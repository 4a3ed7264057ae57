"""The injector: silent unless asked for, then at the place, rank and step that were named, and loud."""

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


def ask(patch: pytest.MonkeyPatch, *wanted: dict[str, Any]) -> None:
    patch.setenv(faults.VARIABLE, json.dumps(wanted))
    faults.parse.cache_clear()


def test_nothing_happens_by_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    assert faults.at("step", rank=0, step=0) is False and faults.environment() == {}
    assert capsys.readouterr().err == ""


def test_it_is_loud_and_happens_where_it_was_asked_for_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(monkeypatch, {"fault": "nan", "at": "loss", "rank": 1, "step": 3}, {"fault": "raise", "at": "validate"})
    assert faults.at("loss", rank=1, step=3) is True
    told = capsys.readouterr().err
    assert "ANTDIST_FAULTS IS SET: THIS PROCESS INJECTS FAULTS ON PURPOSE" in told
    assert "nan at loss (rank 1, step 3)" in told
    for place, rank, step in (("loss", 0, 3), ("loss", 1, 2), ("step", 1, 3)):
        assert faults.at(place, rank=rank, step=step) is False
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError, match="a fault that ANTDIST_FAULTS asked for"):
        faults.at("validate", rank=0, step=9)
    assert faults.environment()[faults.VARIABLE]


def test_a_full_disk_a_stall_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    once = tmp_path / "done"
    ask(monkeypatch, {"fault": "full", "at": "save", "file": "COMPLETE.json", "once": str(once)})
    with pytest.raises(OSError, match="No space left on device"):
        faults.at("save", rank=0, step=1, file="COMPLETE.json")
    assert once.is_file() and faults.at("save", rank=0, step=1, file="COMPLETE.json") is False
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    ask(monkeypatch, {"fault": "stall", "rank": 0, "seconds": 7}, {"fault": "stall", "rank": 1})
    faults.at("step", rank=0, step=1)
    faults.at("step", rank=1, step=1)
    assert slept == [7, faults.STALL_SECONDS]


def test_a_fault_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.0, 104.9, 105.0])
    monkeypatch.setattr(faults, "_begun", [])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    ask(monkeypatch, {"fault": "nan", "at": "loss", "after": 5})
    assert [faults.at("loss", rank=0, step=k) for k in range(3)] == [False, False, True]


def test_a_kill_is_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, {"fault": "kill", "step": 2})
    code = "from antdist import faults; [faults.at('step', rank=0, step=k) or print(k) for k in range(4)]"
    done = subprocess.run([sys.executable, "-u", "-c", code], capture_output=True, text=True)
    assert done.returncode == -9 and done.stdout.split() == ["0", "1"], done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "ANTDIST_FAULTS: no JSON"),
        ("{}", "not a list of faults"),
        ('[{"fault": "melt"}]', "unknown fault 'melt'; known: kill, stall"),
        ('[{"fault": "kill", "at": "noon"}]', "unknown place 'noon'"),
        ('[{"fault": "kill", "when": 3}]', "unknown key when"),
    ],
)
def test_a_malformed_wish_is_refused(monkeypatch: pytest.MonkeyPatch, text: str, told: str) -> None:
    monkeypatch.setenv(faults.VARIABLE, text)
    with pytest.raises(UserError, match=told):
        faults.at("step", rank=0, step=0)
    with pytest.raises(UserError, match=told):
        faults.environment()


def test_files_are_damaged_as_disks_damage_them(tmp_path: Path) -> None:
    file, content = tmp_path / "f", bytes(range(100))
    file.write_bytes(content)
    faults.corrupt(file, "flip")
    differing = [a ^ b for a, b in zip(file.read_bytes(), content, strict=True) if a != b]
    assert differing == [1]
    faults.corrupt(file, "cut")
    assert file.read_bytes() == content[:50]
    faults.corrupt(file, "gone")
    assert not file.exists()
