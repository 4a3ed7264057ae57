"""A rank that makes no progress is found, its stacks are written down, and it ends, so that the group is started again.

Limits differ by phase (`training.hang`): until the first step is done, for each step with its wait for data, and for a
validation or checkpoint. Where one rank stalls, its peers wait for it in a collective and end too, each with its stacks.

A thread watches. Where the interpreter itself is stuck, so that no thread runs (a memory map on storage that is gone),
faulthandler's own timer ends the process, some time after the longest limit.
"""

from __future__ import annotations

import faulthandler
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from antdist.config.schema import HangConfig
from antdist.io.logs import get_logger

logger = get_logger(__name__)

Phase = Literal["start", "step", "checkpoint"]
HUNG = 76  # the exit status of a rank that ends itself
STANDARD_ERROR = 2


class Watchdog:
    """Watches its block. `at` says what has begun."""

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

    def at(self, phase: Phase) -> None:
        """A phase begins, or the next step does."""
        self._stage = (phase, self._stage[1] + 1)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        # ticks are counted, as the clock goes on while the whole process is stopped
        seen, ticks = self._stage, 0
        while True:
            # set anew while this thread runs; it needs no interpreter to go off
            faulthandler.dump_traceback_later(max(self.limits.values()) + 2 * self.tick, exit=True, file=STANDARD_ERROR)
            if self._over.wait(self.tick):
                return
            ticks = ticks + 1 if self._stage == seen else 0
            seen = self._stage
            if ticks * self.tick > self.limits[seen[0]]:
                self._end(seen[0])

    def _end(self, phase: Phase) -> None:
        try:
            logger.warning(
                f"{self.name}: rank {self.rank} made no progress for {self.limits[phase] / 60:g} minutes "
                f"(training.hang.{phase}_minutes): it ends; the stacks of each rank are in {self.file.parent}"
            )
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, rank {self.rank}, phase {phase}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        finally:  # whatever a full disk or a closed terminal makes of these
            os._exit(HUNG)
