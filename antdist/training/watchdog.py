"""The watchdog: ends a rank that makes no progress, after dumping its stacks.

Limits differ by phase (`training.hang`): until the first step is done, for each step including its wait for data, and
for a validation or checkpoint. If one rank stalls, its peers wait for it in a collective and end too, each with its
stacks.

A thread watches. If the interpreter itself is stuck, so that no thread runs (a memory map on lost storage),
faulthandler's own timer ends the process, some time after the longest limit.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from antdist.config.schema import HangConfig
from antdist.io.logs import get_logger

logger = get_logger(__name__)

Phase = Literal["start", "step", "checkpoint"]
HUNG = 76  # the exit status of a rank that the watchdog ends
STANDARD_ERROR = 2


class Watchdog:
    """Watches its block: phase "start", then step by step, with `phase` around what takes longer."""

    def __init__(self, folder: Path, rank: int, name: str, limits: HangConfig) -> None:
        self.file, self.rank, self.name = folder / "hang" / f"rank-{rank}.txt", rank, name
        self.limits: dict[Phase, float] = {
            "start": 60 * limits.start_minutes,
            "step": 60 * limits.step_minutes,
            "checkpoint": 60 * limits.checkpoint_minutes,
        }
        self.tick = min(5.0, min(self.limits.values()) / 4)
        self._stage: tuple[Phase, int] = ("start", 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def step_done(self) -> None:
        """Note that a step is done: the limit of a step, with its wait for data, restarts."""
        self._begin("step")

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Apply the limit of `phase` to the block, and that of a step after it; nested blocks count as one."""
        if self._stage[0] == phase:
            yield
            return
        self._begin(phase)
        yield  # an exception ends the training: the phase lasts until the watchdog's own block ends
        self._begin("step")

    def _begin(self, phase: Phase) -> None:
        self._stage = (phase, self._stage[1] + 1)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        # count ticks instead of reading the clock, which continues while the whole process is suspended
        seen, ticks = self._stage, 0
        while True:
            # re-armed while this thread runs; it fires without the interpreter
            faulthandler.dump_traceback_later(max(self.limits.values()) + 2 * self.tick, exit=True, file=STANDARD_ERROR)
            if self._over.wait(self.tick):
                return
            ticks = ticks + 1 if self._stage == seen else 0
            seen = self._stage
            if ticks * self.tick > self.limits[seen[0]]:
                self._exit(seen[0])

    def _exit(self, phase: Phase) -> None:
        try:
            logger.warning(
                f"{self.name}: rank {self.rank} made no progress for {self.limits[phase] / 60:g} minutes "
                f"(training.hang.{phase}_minutes): exiting; the stacks of each rank are in {self.file.parent}"
            )
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, rank {self.rank}, phase {phase}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        finally:  # even if the disk is full or the terminal is closed
            os._exit(HUNG)
