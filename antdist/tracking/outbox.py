"""The outbox of a run: tracking records on disk until the server has them, in order and exactly once.

Order: `append` writes under a lock and `next_batch` reads from the front, so records leave as they were logged.
At least once: a record counts as sent when the server has acknowledged it, and the file is emptied only when all of it
is sent. A killed process therefore leaves every undelivered record, and the next one sends them again.
At most once: to send again does no harm. MLflow identifies a point by key, step, value and timestamp, and the record
keeps the timestamp of logging; parameters, tags and artifacts overwrite themselves. `wants_point` refuses the steps that
an earlier process left here, which a run that resumes from a checkpoint logs again.
Whole records: a line is appended by one write, and cut off again if the disk takes only a part of it. A line that a kill
cut short is dropped when the file is opened; its step comes again from the checkpoint.
No fsync: the outbox survives the death of its process. A power cut may lose the lines that the kernel had not written,
which is the price of a log call that never waits for a disk.

In a long outage the outbox grows ever more slowly: with each `THINNING_BYTES` that are pending, a metric of many points
keeps half as many from then on. All other records are kept.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from antdist.io.files import write_atomically
from antdist.io.logs import get_logger

THINNING_BYTES = 64 * 2**20
UNTHINNED_POINTS = 1000  # of each metric, kept in any case
MAX_ENTRIES, MAX_PARAMS_OR_TAGS = 1000, 100  # what MLflow accepts in one log_batch

Record = dict[str, Any]
logger = get_logger(__name__)


class Outbox:
    """A file of records, one JSON object a line, for one writer and one sender in this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._sent = 0  # bytes at the front that the server has
        self._unwritten: list[bytes] = []  # lines that the disk refused
        self._released = False  # the file may belong to another process
        self._level = 0  # `THINNING_BYTES` that are pending
        self._thinned = 0  # points dropped since the last report
        self._points: dict[str, int] = {}  # of each metric, logged since the outbox was empty
        self._last_steps: dict[str, int] = {}  # of each metric, as an earlier process left it
        path.parent.mkdir(parents=True, exist_ok=True)
        self._repair()

    def append(self, records: list[Record]) -> None:
        """Write records, all or none; keep them in memory while the disk refuses."""
        with self._lock:
            refused_before = bool(self._unwritten)
            self._unwritten += [json.dumps(record).encode() + b"\n" for record in records]
            data = b"".join(self._unwritten)
            try:
                with self.path.open("ab", buffering=0) as file:
                    before = file.seek(0, os.SEEK_END)
                    self._set_level(before + len(data) - self._sent)
                    if file.write(data) < len(data):
                        file.truncate(before)
                        raise OSError("the disk is full")
                self._unwritten.clear()
            except OSError as error:
                if not refused_before:
                    logger.warning("cannot write %s, tracking records wait in memory: %s", self.path, error)

    def wants_point(self, key: str, step: int) -> bool:
        """Return whether a metric's next point is to be appended: it is new, and not thinned out."""
        if step <= self._last_steps.get(key, -1):
            return False
        points = self._points[key] = self._points.get(key, 0) + 1
        kept = points <= UNTHINNED_POINTS or points % 2**self._level == 0
        self._thinned += not kept
        return kept

    def next_batch(self) -> tuple[list[Record], int]:
        """Return the next records that fit into one request, and their end for `mark_sent`.

        Metrics, params and tags share a batch; every other record is a batch of its own. Empty once released.
        """
        batch: list[Record] = []
        counts = {"metric": 0, "param": 0, "tag": 0}
        if self._released:
            return batch, self._sent
        with self.path.open("rb") as file:
            end = file.seek(self._sent)
            for line in file:
                if not line.endswith(b"\n"):  # being written
                    break
                record = json.loads(line)
                kind = record["kind"]
                if kind not in counts:
                    return ([record], end + len(line)) if not batch else (batch, end)
                counts[kind] += 1
                if len(batch) == MAX_ENTRIES or max(counts["param"], counts["tag"]) > MAX_PARAMS_OR_TAGS:
                    break
                batch.append(record)
                end += len(line)
        return batch, end

    def mark_sent(self, end: int) -> None:
        """Record that the server has everything before this position."""
        self._sent = end

    def empty_if_sent(self) -> None:
        """Truncate the file if the server has all of it and no other process may be using it."""
        with self._lock:
            if not self._released and self.path.stat().st_size == self._sent:
                os.truncate(self.path, 0)
                self._sent, self._level = 0, 0
                self._points.clear()

    def release(self) -> None:
        """Leave the file to the next process: an answer that arrives late must not empty it."""
        with self._lock:
            self._released = True

    def count_pending(self) -> int:
        """Count the records that the server does not have."""
        with self._lock, self.path.open("rb") as file:
            file.seek(self._sent)
            return sum(1 for _ in file) + len(self._unwritten)

    def report_thinning(self) -> None:
        """Log how many points were dropped since the last report, if any."""
        if self._thinned:
            logger.warning("%d points of long curves were dropped because the outbox was large", self._thinned)
        self._thinned = 0

    def _repair(self) -> None:
        """Drop lines that a killed process left incomplete, and index the points that are pending."""
        self.path.touch()
        with (
            write_atomically(self.path, sync="none") as repaired,
            self.path.open("rb") as file,
            repaired.open("wb") as kept,
        ):
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    logger.warning("%s: an incomplete record is dropped", self.path)
                    continue
                kept.write(line.rstrip() + b"\n")
                if record["kind"] == "metric":
                    key = record["key"]
                    self._last_steps[key] = max(self._last_steps.get(key, -1), record["step"])
                    self._points[key] = self._points.get(key, 0) + 1

    def _set_level(self, pending: int) -> None:
        level = pending // THINNING_BYTES
        if level > self._level:
            logger.warning(
                "%d MiB of tracking records wait in %s; long curves keep one point in %d from here on",
                pending // 2**20,
                self.path,
                2**level,
            )
        self._level = level
