"""A profiled training writes a trace with the named parts of a step; an unprofiled one pays nothing."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from antdist import profiling
from tests.ranks import on_ranks
from tests.training.runs import NAMES, run
from tests.worlds import make_domains

PARTS = {"wait for data", "copy to device", "forward", "backward", "update", "checkpoint"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_domains(folder, NAMES)
    return folder


def events(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return found


def profiled_run(data: Path, folder: Path, steps: int) -> list[tuple[int, float]]:
    curve: list[tuple[int, float]] = run(data, folder, profile=True, stop_after=steps, checkpoint_every=3)["curve"]
    return curve


def test_each_rank_traces_five_steps_with_named_parts(data: Path, tmp_path: Path) -> None:
    on_ranks(2, profiled_run, data, tmp_path / "a", 12)
    files = sorted((tmp_path / "a" / "profile").iterdir())
    assert [file.name for file in files] == ["rank-0.json.gz", "rank-1.json.gz"]
    for file in files:
        names = [event["name"] for event in events(file) if event.get("ph") == "X"]
        assert set(names) >= PARTS
        assert names.count("update") == profiling.RECORDED
        assert sum(name.startswith("ProfilerStep#") for name in names) >= profiling.RECORDED


def test_a_short_run_traces_its_steps_and_logs_the_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profiled_run(data, tmp_path / "a", 7) == run(data, tmp_path / "b", stop_after=7)["curve"]
    assert f"{tmp_path / 'a' / 'profile' / 'rank-0.json.gz'} (open it in" in capsys.readouterr().err
    names = [event["name"] for event in events(tmp_path / "a" / "profile" / "rank-0.json.gz")]
    assert names.count("update") == 2
    profiled_run(data, tmp_path / "c", 4)
    assert not (tmp_path / "c" / "profile").exists()


def test_trace_part_costs_nothing_while_off() -> None:
    assert profiling.trace_part("forward") is profiling.trace_part("backward")
    assert isinstance(profiling.trace_part("forward"), contextlib.nullcontext)
