"""Quarantine a few bad records with file, line and reason; refuse files with more of them.

The cap is a share of a file's records, `--max-bad` (default 0.1 %), or five records where those are no more than 1 % of
the file. Above it the file itself is taken to be bad: the first fault is raised and nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from antdist.errors import UserError

QUARANTINE_NAME = "quarantine.jsonl"
MAX_BAD = 0.001  # share of a file's records
FEW, FEW_SHARE = 5, 0.01
EARLY_CHECK = 1000  # from so many bad records on, the cap is checked while reading, not only at the end of the file


@dataclass(frozen=True)
class BadRecord:
    """One quarantined record: a line of a file, or the record with this key."""

    file: str
    line: int | None
    key: str | None
    reason: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}{f' ({self.key})' if self.key is not None else ''}: {self.reason}"


def max_bad_records(records: int, max_bad: float) -> int:
    """Return how many of `records` may be bad. A cap of 0 allows none."""
    return 0 if max_bad == 0 else int(max(max_bad * records, min(FEW, FEW_SHARE * records)))


class Quarantine:
    """The quarantined records of all files of one preparation.

    Args:
        max_bad: the cap, a share of a file's records.
    """

    def __init__(self, max_bad: float = 0.0) -> None:
        if not 0 <= max_bad <= 1:
            raise UserError(f"is {max_bad}, not a share between 0 and 1", where="--max-bad", remedy="use 0.001, say")
        self.max_bad = max_bad
        self.records: list[BadRecord] = []

    def inspect(self, path: Path) -> FileQuarantine:
        """Start counting the records of a file."""
        return FileQuarantine(self, path)


class FileQuarantine:
    """Counts the records of one file, and holds its bad ones until `close` checks them against the cap."""

    def __init__(self, quarantine: Quarantine, path: Path) -> None:
        self.path, self.good, self.bad = path, 0, 0
        self._quarantine = quarantine
        self._records: list[BadRecord] = []
        self._first: UserError | None = None

    def add(self, fault: UserError, line: int | None = None, key: str | None = None, records: int = 1) -> None:
        """Add a bad record (or several, where a fault spans lines).

        Raises:
            UserError: the cap is 0, or at least `EARLY_CHECK` records are bad and exceed the cap of those read so far.
        """
        self._first = self._first or fault
        self.bad += records
        self._records.append(BadRecord(str(self.path), line, key, fault.what))
        if self.bad >= EARLY_CHECK or self._quarantine.max_bad == 0:
            self._check()

    def close(self) -> None:
        """Finish the file: hand its bad records to the quarantine.

        Raises:
            UserError: the first fault, if the bad records exceed the cap or there is no good record.
        """
        self._check()
        self._quarantine.records += self._records

    def _check(self) -> None:
        read, most = self.good + self.bad, max_bad_records(self.good + self.bad, self._quarantine.max_bad)
        if self._first is None or (self.bad <= most and self.good):
            return
        first, more = self._first, ""
        if self.bad > 1:
            more = f" ({self.bad:,} of {read:,} records are bad, at most {most:,} may be)"
        raise UserError(first.what + more, where=first.where, remedy=first.remedy) from None


def write_quarantine(folder: Path, records: Iterable[BadRecord]) -> Path:
    """Write `quarantine.jsonl` into the folder: one object a line with `file`, `line`, `key` and `reason`."""
    path = folder / QUARANTINE_NAME
    lines = (json.dumps(asdict(record)) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path
