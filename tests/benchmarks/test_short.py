"""Each benchmark's short form runs and gives figures; their values do not matter here."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.__main__ import NAMES, run
from benchmarks.machine import machine
from benchmarks.report import Options, to_json

WITHOUT_RATIOS = ("gpu", "quality")  # no GPU in CI; quality is a difference and its p-value
ONCE = Options(short=True, repeats=1, threads=1)


@pytest.mark.parametrize("name", NAMES)
def test_short_form_gives_figures(name: str) -> None:
    report = run(name, ONCE)
    assert report.name == name and report.work
    for line in report.lines:
        assert len(line.values) == 1 or (line.values and name == "soak"), line.what  # the soak has one value a fault
        assert all(math.isfinite(value) for value in line.values), line.what
        assert line.unit != "x" or line.median > 0, line.what
    assert any(line.unit == "x" for line in report.lines) or name in WITHOUT_RATIOS
    document = json.loads(json.dumps(to_json(report, machine(ONCE.threads)), allow_nan=False))
    assert [line["what"] for line in document["lines"]] == [line.what for line in report.lines]
