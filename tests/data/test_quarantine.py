"""The cap of bad records, and the quarantine file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from antdist.data.quarantine import EARLY_CHECK, BadRecord, Quarantine, max_bad_records, write_quarantine
from antdist.errors import UserError


@pytest.mark.parametrize(
    ("records", "max_bad", "most"),
    [
        (10, 0.001, 0),
        (99, 0.001, 0),
        (100, 0.001, 1),
        (499, 0.001, 4),
        (500, 0.001, 5),
        (5_000, 0.001, 5),
        (6_000, 0.001, 6),
        (1_000_000, 0.001, 1000),
        (1_000_000, 0.0, 0),
        (10, 0.5, 5),
    ],
)
def test_cap_is_a_share_of_the_records_or_five(records: int, max_bad: float, most: int) -> None:
    assert max_bad_records(records, max_bad) == most


def fault(line: int) -> UserError:
    return UserError("is bad", where=f"f:{line}", remedy="fix it")


def test_above_the_cap_the_first_fault_is_raised() -> None:
    quarantine = Quarantine(0.001)
    file = quarantine.inspect(Path("f"))
    file.good = 499
    file.add(fault(7), 7, "k")
    file.close()
    assert quarantine.records == [BadRecord("f", 7, "k", "is bad")]
    other = quarantine.inspect(Path("g"))
    other.good = 98
    other.add(fault(1), 1)
    with pytest.raises(UserError, match=r"f:1: is bad\. Fix it"):
        other.close()
    assert len(quarantine.records) == 1


def test_file_of_bad_records_alone_is_refused() -> None:
    file = Quarantine(1.0).inspect(Path("f"))
    file.add(fault(1), 1)
    with pytest.raises(UserError, match="f:1: is bad"):
        file.close()


def test_cap_of_zero_and_many_bad_records_fail_early() -> None:
    with pytest.raises(UserError, match="f:3: is bad"):
        Quarantine(0.0).inspect(Path("f")).add(fault(3), 3)
    file = Quarantine(0.001).inspect(Path("f"))
    for line in range(1, EARLY_CHECK):
        file.add(fault(line), line)
    with pytest.raises(UserError, match=r"f:1: is bad \(1,000 of 1,000 records are bad, at most 5 may be\)"):
        file.add(fault(EARLY_CHECK), EARLY_CHECK)


def test_cap_must_be_a_share() -> None:
    with pytest.raises(UserError, match="--max-bad: is 2"):
        Quarantine(2)


def test_quarantine_file_is_json_lines_for_any_reason(tmp_path: Path) -> None:
    record = BadRecord("f", None, "\udc80", "two\nlines")
    path = write_quarantine(tmp_path, [record, record])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [vars(record)] * 2
