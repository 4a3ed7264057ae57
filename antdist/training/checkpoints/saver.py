"""Background saves: one at a time, in order, and every failure is raised on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from antdist import faults
from antdist.config.schema import TrainingConfig
from antdist.errors import UserError
from antdist.io.files import flush_to_disk
from antdist.io.logs import get_logger
from antdist.training.checkpoints import BEST, CHECKPOINTS
from antdist.training.checkpoints.local import (
    best_weights,
    describe,
    read_documents,
    recorded_best,
    save_checkpoint,
    write_tensors,
)
from antdist.training.checkpoints.uploads import Uploads
from antdist.training.engines.base import EngineState
from antdist.training.progress import Progress

logger = get_logger(__name__)


class Saver:
    """The leader's background writer. Its block ends when the last save is on disk, also after an error."""

    def __init__(self, folder: Path, config: TrainingConfig, uploads: Uploads | None = None) -> None:
        self.folder, self.config, self.uploads = folder, config, uploads
        self.snapshot: EngineState | None = None  # the last one; its memory is reused for the next
        # not a daemon: the interpreter waits for the last save before it exits
        self._thread = ThreadPoolExecutor(1, "saver")
        self._running: Future[None] | None = None

    def save(self, state: EngineState, document: dict[str, Any]) -> None:
        """Begin to write a checkpoint with its best weights; `document` is its progress and stream position."""
        self.begin(lambda: save_with_best(self.folder, state, document, self.config, self.uploads))

    def begin(self, write: Callable[[], None]) -> None:
        """Run `write` in the background, once the previous one has been waited for."""
        assert self._running is None, "one save at a time"
        self._running = self._thread.submit(write)

    def wait(self) -> UserError | None:
        """Wait until the save is on disk; return the error, once, if disk, network or permissions caused one."""
        running, self._running = self._running, None
        error = None if running is None else running.exception()
        if isinstance(error, OSError):
            return UserError(
                f"a checkpoint cannot be written ({error.strerror or error})",
                where=error.filename or self.folder,
                remedy="free space or repair the storage, then run the same command again: it resumes from the last "
                "complete checkpoint",
            )
        if error is not None:
            raise error
        return None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            failure = self.wait()
        finally:
            self._thread.shutdown()
        if failure is not None:
            if error is None:
                raise failure
            logger.warning(f"another failure: {failure}")  # the error that ended the block is raised


def save_with_best(
    folder: Path, state: EngineState, document: dict[str, Any], config: TrainingConfig, uploads: Uploads | None
) -> None:
    """Write a checkpoint to a run's folder, and drop those that `config` does not retain.

    Best weights are on disk before the checkpoint that names them, and stay as long as any checkpoint names them:
    after a crash at any point, the best weights of every checkpoint exist.
    """
    progress, checkpoints = Progress(**document["progress"]), folder / CHECKPOINTS
    if progress.best_epoch is not None:
        path = best_weights(folder, progress.best_epoch)
        is_new_best = (progress.epoch, progress.batch) == (progress.best_epoch, 0)
        if is_new_best:
            faults.inject("save", rank=0, step=progress.step, file="best")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, state.weights)
            flush_to_disk(path.parent)
        # a later checkpoint repeats the digest of the first one, so that damage to the file since then is detected
        recorded = None if is_new_best else recorded_best(checkpoints, progress.best_epoch, before=progress.step)
        document["best"] = recorded or {"epoch": progress.best_epoch, "file": describe(path)}
    in_use = {uploads.uploading} if uploads is not None and uploads.uploading is not None else set[int]()
    save_checkpoint(checkpoints, progress.step, state, document, config.keep_checkpoints, config.keep_every, in_use)
    if uploads is not None:
        uploads.offer(progress.step)
    epochs = [kept["progress"]["best_epoch"] for kept in read_documents(checkpoints)]
    needed = {best_weights(folder, epoch) for epoch in epochs if epoch is not None}
    for path in (folder / BEST).glob("*.safetensors"):
        if path not in needed:
            path.unlink()
