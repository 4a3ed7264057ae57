"""Saves in the background: one at a time, in the order in which they were begun, and none that fails in silence."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from antdist.errors import UserError
from antdist.io.logs import get_logger
from antdist.training.checkpoints.uploads import Uploads
from antdist.training.engines.plain import EngineState

logger = get_logger(__name__)


class Saver:
    """The leader's writer. Leaving its block waits until what was begun is on disk, whatever ends the block. `uploads`:
    where what is on disk goes on to."""

    def __init__(self, folder: Path, uploads: Uploads | None = None) -> None:
        self.folder, self.uploads = folder, uploads
        self.snapshot: EngineState | None = None  # memory of the state that is or was written, for the next one
        # not a daemon: an interpreter that ends waits for its last save
        self._thread = ThreadPoolExecutor(1, "saver")
        self._running: Future[None] | None = None

    def begin(self, write: Callable[[], None]) -> None:
        """Run `write` in the background; the one before has been waited for."""
        assert self._running is None, "one save at a time"
        self._running = self._thread.submit(write)

    def wait(self) -> UserError | None:
        """Until what was begun is on disk; why it is not, if disk, network or permissions refuse. Each failure is told once."""
        running, self._running = self._running, None
        error = None if running is None else running.exception()
        if isinstance(error, OSError):
            return UserError(
                f"a checkpoint cannot be written ({error.strerror or error})",
                where=error.filename or self.folder,
                remedy="make room or mend the storage; the same command goes on from the last whole checkpoint",
            )
        if error is not None:
            raise error
        return None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            failure = self.wait()
        finally:
            self._thread.shutdown()
        if failure is not None:
            if error is None:
                raise failure
            logger.warning(f"besides: {failure}")  # what ends the block is raised
