"""The report of a benchmark: lines of figures with their spread, for people and as JSON.

A figure has one value a repeat. A ratio compares two works of the same repeat, which alternate in one run, so that a noisy
machine slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """The options of a run; some apply to a few benchmarks only."""

    short: bool = False
    repeats: int = 5
    threads: int = 2
    data: Path | None = None  # a prepared domain, or a folder of them
    settings: tuple[str, ...] = ()  # overrides of the configuration
    picture: Path | None = None  # the file for curves
    minutes: float = 20.0  # how long to run


@dataclass(frozen=True)
class Line:
    """One figure: a value for each repeat."""

    what: str
    values: list[float]
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Report:
    """Figures and notes; `work` states exactly what was compared."""

    name: str
    work: str
    lines: list[Line]
    notes: list[str]


def ratio(what: str, fast: Sequence[float], slow: Sequence[float]) -> Line:
    """Divide `fast` by `slow`, repeat by repeat: pass rates as (ours, theirs), seconds as (theirs, ours)."""
    return Line(what, [f / s for f, s in zip(fast, slow, strict=True)], "x")


def alternate(works: dict[str, Callable[[], float | None]], repeats: int) -> dict[str, list[float]]:
    """Measure the seconds of each work in each of `repeats` rounds, after a warm-up round.

    A work that returns a number has measured itself: the number replaces its seconds.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            measured = work()
            seconds = time.perf_counter() - start
            if number:
                found[name].append(seconds if measured is None else measured)
    return found


def format_report(report: Report, machine: dict[str, Any]) -> str:
    """Format the report as aligned columns (what, median, spread over repeats), then notes and machine."""
    head = ["", "median", "from", "to", "unit"]
    cells = [
        head,
        *(
            [
                line.what,
                format_number(line.median),
                format_number(min(line.values)),
                format_number(max(line.values)),
                line.unit,
            ]
            for line in report.lines
        ),
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]

    def aligned(row: list[str]) -> str:
        sides = [str.ljust, str.rjust, str.rjust, str.rjust, str.ljust]
        return "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()

    repeats = max((len(line.values) for line in report.lines), default=0)
    return "\n".join(
        [
            f"{report.name}: {report.work}",
            f"Median and spread of {repeats} repeats:" if repeats > 1 else "One repeat:",
            "",
            *map(aligned, [head, ["-" * width for width in widths], *cells[1:]]),
            "",
            *report.notes,
            *(f"{key}: {value}" for key, value in machine.items()),
        ]
    )


def format_number(value: float) -> str:
    """Format a number with three significant digits, or all before the point, and separators."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def to_json(report: Report, machine: dict[str, Any]) -> dict[str, Any]:
    """Convert the report to a JSON document."""
    lines = [
        {
            "what": line.what,
            "unit": line.unit,
            "median": line.median,
            "min": min(line.values),
            "max": max(line.values),
            "values": line.values,
        }
        for line in report.lines
    ]
    return {"name": report.name, "work": report.work, "lines": lines, "notes": report.notes, "machine": machine}
