"""The frame of the benchmarks: ratios repeat by repeat, alternating works, table and JSON."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import NAMES, main
from benchmarks.machine import machine
from benchmarks.report import Line, Report, alternate, format_number, format_report, ratio, to_json


def test_a_ratio_compares_the_same_repeat() -> None:
    assert ratio("r", [2.0, 9.0], [1.0, 3.0]) == Line("r", [2.0, 3.0], "x")
    with pytest.raises(ValueError):
        ratio("r", [2.0], [1.0, 3.0])


def test_works_alternate_after_a_warm_up_round() -> None:
    order: list[str] = []

    def measured_itself() -> float:
        order.append("b")
        return 42.0

    found = alternate({"a": lambda: order.append("a"), "b": measured_itself}, repeats=2)
    assert order == ["a", "b"] * 3
    assert found["b"] == [42.0, 42.0]
    assert len(found["a"]) == 2 and all(seconds >= 0 for seconds in found["a"])


def test_table_and_json_agree() -> None:
    report = Report("x", "one against two", [Line("rate", [3.0, 1000.0, 2.0], "1/s")], ["a note"])
    facts = machine(3)
    text, document = format_report(report, facts), json.loads(json.dumps(to_json(report, facts)))
    row = next(line for line in text.splitlines() if line.startswith("rate"))
    assert row.split() == ["rate", "3", "2", "1,000", "1/s"]
    assert "one against two" in text and "a note" in text and "threads: 3" in text
    assert document["lines"] == [
        {"what": "rate", "unit": "1/s", "median": 3.0, "min": 2.0, "max": 1000.0, "values": [3.0, 1000.0, 2.0]}
    ]
    assert document["machine"]["threads"] == 3 and "torch" in document["machine"]["versions"]


def test_commit_is_reported_with_and_without_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"mlflow.source.git.commit": "0123456789abcdef"}
    monkeypatch.setattr("benchmarks.machine.environment_tags", lambda folder: tags)
    assert machine(1)["commit"] == "0123456789ab"
    tags["git.changed"] = "true"
    assert machine(1)["commit"] == "0123456789ab with changes"


def test_numbers_keep_three_digits() -> None:
    assert [format_number(v) for v in (1234567.8, 12.345, 0.012345, 3.0)] == ["1,234,568", "12.3", "0.0123", "3"]


def test_without_a_name_all_benchmarks_are_listed() -> None:
    told = CliRunner().invoke(main, [])
    assert told.exit_code == 0
    assert [line.split()[0] for line in told.output.splitlines()] == list(NAMES)
