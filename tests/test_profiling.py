"""A profiled training writes a trace that names the parts of a step; one that is not profiled pays nothing."""

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


def test_each_rank_writes_a_trace_of_five_steps_with_their_parts(data: Path, tmp_path: Path) -> None:
    on_ranks(2, profiled_run, data, tmp_path / "a", 12)
    files = sorted((tmp_path / "a" / "profile").iterdir())
    assert [file.name for file in files] == ["rank-0.json.gz", "rank-1.json.gz"]
    for file in files:
        names = [event["name"] for event in events(file) if event.get("ph") == "X"]
        assert set(names) >= PARTS
        assert names.count("update") == profiling.RECORDED
        assert sum(name.startswith("ProfilerStep#") for name in names) >= profiling.RECORDED


def test_a_run_that_ends_early_gives_the_steps_that_it_had_and_says_where(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profiled_run(data, tmp_path / "a", 7) == run(data, tmp_path / "b", stop_after=7)["curve"]
    assert f"{tmp_path / 'a' / 'profile' / 'rank-0.json.gz'}, to be opened in" in capsys.readouterr().err
    names = [event["name"] for event in events(tmp_path / "a" / "profile" / "rank-0.json.gz")]
    assert names.count("update") == 2
    profiled_run(data, tmp_path / "c", 4)
    assert not (tmp_path / "c" / "profile").exists()


def test_a_part_is_nothing_while_no_one_profiles() -> None:
    assert profiling.part("forward") is profiling.part("backward")
    assert isinstance(profiling.part("forward"), contextlib.nullcontext)
