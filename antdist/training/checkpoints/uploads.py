"""Background uploads of checkpoints to remote storage: one at a time, always the newest.

Training never waits for them: checkpoints on disk suffice to resume. A failed upload is retried until it succeeds or a
newer checkpoint replaces it; if saves are faster than uploads, some are not uploaded.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from antdist.errors import UserError
from antdist.io.logs import get_logger
from antdist.io.storage import Unreachable
from antdist.training.checkpoints import CHECKPOINTS
from antdist.training.checkpoints.local import steps_in
from antdist.training.checkpoints.remote import Remote

logger = get_logger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between attempts
QUIET_SECONDS = 5.0  # of waiting at the end before a message is printed


class Uploads:
    """The leader's background uploader. At the end its block waits up to `seconds` for the newest.

    At the start it uploads what an earlier process left behind.
    """

    def __init__(self, remote: Remote, folder: Path, keep: int, keep_every: int | None, seconds: float) -> None:
        self.remote, self.folder, self.keep, self.keep_every = remote, folder, keep, keep_every
        self.seconds = seconds
        self.uploading: int | None = None  # the step whose files must not be removed
        self._offered: int | None = None  # the newest complete step on disk, waiting to be uploaded
        self._changed = threading.Condition()
        self._ending, self._given_up = threading.Event(), False
        self._pause = 0.0  # before the next attempt; 0 unless the last one failed
        self._error: BaseException | None = None
        # a daemon: at the end unreachable storage is given up
        self._thread = threading.Thread(target=self._upload_all, name="uploads", daemon=True)

    def offer(self, step: int) -> None:
        """Upload a checkpoint that is complete on disk; it replaces one that is still waiting."""
        with self._changed:
            self._offered = step
            self._changed.notify()

    def __enter__(self) -> Uploads:
        self._offered = max(steps_in(self.folder / CHECKPOINTS), default=None)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._ending.set()
        with self._changed:
            self._changed.notify()
        self._thread.join(min(QUIET_SECONDS, self.seconds))
        if self._thread.is_alive():
            logger.info(
                f"uploading the last checkpoint to {self.remote.uri}: waiting up to {self.seconds / 60:g} minutes"
            )
            self._thread.join(max(0.0, self.seconds - QUIET_SECONDS))
        if self._thread.is_alive():
            self._given_up = True
            logger.warning(
                f"the last checkpoint was not uploaded to {self.remote.uri} within {self.seconds / 60:g} minutes; "
                f"it is complete in {self.folder / 'checkpoints'}, and running the same command again uploads it"
            )
        if self._error is not None and error is None:
            raise self._error

    def _upload_all(self) -> None:
        try:
            while (step := self._next()) is not None:
                self._upload(step)
        except BaseException as error:  # a bug: raised when the block ends
            self._error = error

    def _next(self) -> int | None:
        """Wait for a step to upload; None at the end."""
        with self._changed:
            self.uploading = None
            self._changed.wait_for(lambda: self._offered is not None or self._ending.is_set())
            # a save that runs meanwhile retains this step as the newest on disk; later saves see `uploading`
            self.uploading, self._offered = self._offered, None
            return self.uploading

    def _upload(self, step: int) -> None:
        """Upload with retries, until it succeeds or a newer checkpoint waits."""
        while True:
            try:
                self.remote.upload(self.folder, step, self.keep, self.keep_every)
            except (Unreachable, OSError) as error:
                if self._pause < LONGEST_PAUSE:  # do not repeat it every minute for hours
                    logger.warning(f"the checkpoint of step {step} is not uploaded yet, training continues: {error}")
                self._pause = min(2 * self._pause or FIRST_PAUSE, LONGEST_PAUSE)
            except UserError as damage:
                logger.warning(f"the checkpoint of step {step} cannot be uploaded to {self.remote.uri}: {damage}")
                return
            else:
                if self._pause:
                    logger.info(f"uploaded the checkpoint of step {step} to {self.remote.uri}")
                self._pause = 0.0
                return
            if self._ending.wait(self._pause):
                time.sleep(FIRST_PAUSE)
            if self._offered is not None or self._given_up:
                return
