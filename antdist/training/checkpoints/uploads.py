"""Copies checkpoints to the remote storage, in a thread of its own: one at a time, always the newest.

Training never waits for it: what is whole on disk is enough to go on. A copy that fails is tried again until it succeeds or a
newer checkpoint takes its place, so where saves are faster than copies, some are not copied.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

from antdist.errors import UserError
from antdist.io.logs import get_logger
from antdist.io.storage import Unreachable
from antdist.training.checkpoints.local import steps_in
from antdist.training.checkpoints.remote import Remote

logger = get_logger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between trials
QUIET_SECONDS = 5.0  # that the end waits without a word


class Uploads:
    """The leader's copier. Leaving its block waits for the newest checkpoint to arrive, for `seconds` at most; what an
    earlier session left uncopied is made up for at the start."""

    def __init__(self, remote: Remote, folder: Path, keep: int, keep_every: int | None, seconds: float) -> None:
        self.remote, self.folder, self.keep, self.keep_every = remote, folder, keep, keep_every
        self.seconds = seconds
        self.copying: int | None = None  # the step whose files must not go
        self._offered: int | None = None  # the newest step that is whole on disk and waits to be copied
        self._changed = threading.Condition()
        self._ending, self._given_up = threading.Event(), False
        self._pause = 0.0  # before the next trial; 0 unless the last one failed
        self._mistake: BaseException | None = None
        # a daemon: the end gives up on storage that is away
        self._thread = threading.Thread(target=self._copy_all, name="uploads", daemon=True)

    def offer(self, step: int) -> None:
        """A checkpoint is whole on disk; one that still waited is passed over for it."""
        with self._changed:
            self._offered = step
            self._changed.notify()

    def __enter__(self) -> Uploads:
        self._offered = max(steps_in(self.folder / "checkpoints"), default=None)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        with self._changed:
            self._changed.notify()
        self._thread.join(min(QUIET_SECONDS, self.seconds))
        if self._thread.is_alive():
            logger.info(
                f"the last checkpoint is on its way to {self.remote.uri}: waiting up to {self.seconds / 60:g} minutes"
            )
            self._thread.join(max(0.0, self.seconds - QUIET_SECONDS))
        if self._thread.is_alive():
            self._given_up = True
            logger.warning(
                f"the last checkpoint did not reach {self.remote.uri} in {self.seconds / 60:g} minutes; it is whole in "
                f"{self.folder / 'checkpoints'}, and the same command copies it"
            )
        if self._mistake is not None and error is None:
            raise self._mistake

    def _copy_all(self) -> None:
        try:
            while (step := self._next()) is not None:
                self._copy(step)
        except BaseException as mistake:  # ours: raised at the end
            self._mistake = mistake

    def _next(self) -> int | None:
        """The step to copy, None at the end."""
        with self._changed:
            self.copying = None
            self._changed.wait_for(lambda: self._offered is not None or self._ending.is_set())
            # the newest on disk, so the next save keeps it in any case, and from then on `copying` is seen
            self.copying, self._offered = self._offered, None
            return self.copying

    def _copy(self, step: int) -> None:
        """Until it has arrived, or a newer one waits."""
        while True:
            try:
                self.remote.upload(self.folder, step, self.keep, self.keep_every)
            except (Unreachable, OSError) as error:
                if self._pause < LONGEST_PAUSE:  # no line a minute for hours
                    logger.warning(f"the checkpoint of step {step} is not copied yet, training goes on: {error}")
                self._pause = min(2 * self._pause or FIRST_PAUSE, LONGEST_PAUSE)
            except UserError as damage:
                logger.warning(f"the checkpoint of step {step} is not copied to {self.remote.uri}: {damage}")
                return
            else:
                if self._pause:
                    logger.info(f"the checkpoint of step {step} has reached {self.remote.uri}")
                self._pause = 0.0
                return
            if self._ending.wait(self._pause):
                time.sleep(FIRST_PAUSE)
            if self._offered is not None or self._given_up:
                return
