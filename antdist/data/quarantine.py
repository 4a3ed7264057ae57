"""Bad records are set aside, not passed on and not fatal: each named with its file, place and reason; and only a few.

The cap is a share of a file's records, `--max-bad` (default 0.1 %), or five records where those are no more than 1 % of
the file. More means that the file, not a record of it, is bad: then the first fault is told, and nothing is written.
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
EARLY_CHECK = 1000  # bad records from which on a file is judged by what was read of it, not at its end


@dataclass(frozen=True)
class BadRecord:
    """One record that was set aside: a line of a file, or what `key` names."""

    file: str
    line: int | None
    key: str | None
    reason: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}{f' ({self.key})' if self.key is not None else ''}: {self.reason}"


def max_bad_records(records: int, max_bad: float) -> int:
    """How many of so many records may be bad. A cap of 0 allows none."""
    return 0 if max_bad == 0 else int(max(max_bad * records, min(FEW, FEW_SHARE * records)))


class Quarantine:
    """What was set aside of all files of one preparation.

    Args:
        max_bad: the cap, a share of a file's records.
    """

    def __init__(self, max_bad: float = 0.0) -> None:
        if not 0 <= max_bad <= 1:
            raise UserError(f"is {max_bad}, a share from 0 to 1 was due", where="--max-bad")
        self.max_bad = max_bad
        self.records: list[BadRecord] = []

    def inspect(self, path: Path) -> FileQuarantine:
        """Begin with a file."""
        return FileQuarantine(self, path)


class FileQuarantine:
    """The records of one file, counted; bad ones wait here until `close` knows how many there were in all."""

    def __init__(self, quarantine: Quarantine, path: Path) -> None:
        self.path, self.good, self.bad = path, 0, 0
        self._quarantine = quarantine
        self._records: list[BadRecord] = []
        self._first: UserError | None = None

    def add(self, fault: UserError, line: int | None = None, key: str | None = None, records: int = 1) -> None:
        """Take note of a bad record (of several, where a fault spans lines).

        Raises:
            UserError: none is allowed; or there are a thousand, and they are too many of those read so far.
        """
        self._first = self._first or fault
        self.bad += records
        self._records.append(BadRecord(str(self.path), line, key, fault.what))
        if self.bad >= EARLY_CHECK or self._quarantine.max_bad == 0:
            self._check()

    def close(self) -> None:
        """The file is read: hand what was set aside to the quarantine.

        Raises:
            UserError: the first fault, if there were too many, or nothing else.
        """
        self._check()
        self._quarantine.records += self._records

    def _check(self) -> None:
        read, most = self.good + self.bad, max_bad_records(self.good + self.bad, self._quarantine.max_bad)
        if self._first is None or (self.bad <= most and self.good):
            return
        first, more = self._first, ""
        if self.bad > 1:
            more = f" ({self.bad:,} bad records among {read:,}, {most:,} may be set aside)"
        raise UserError(first.what + more, where=first.where, remedy=first.remedy) from None


def write_quarantine(folder: Path, records: Iterable[BadRecord]) -> Path:
    """Write `quarantine.jsonl` into the folder: `file`, `line`, `key`, `reason` of each record."""
    path = folder / QUARANTINE_NAME
    lines = (json.dumps(asdict(record)) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path
