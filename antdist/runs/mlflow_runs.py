"""The MLflow runs of a folder: restored after a restart, ended after a failure, delivered at last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from antdist.errors import UserError
from antdist.io.logs import get_logger
from antdist.runs.folder import RunFolder
from antdist.runs.records import RunRecord
from antdist.tracking.run import OFFLINE, TrackedRun, check_run_exists

logger = get_logger(__name__)


def restore_record(folder: RunFolder, store: str) -> RunRecord | None:
    """Read `run.json`, restoring it from the copy of the folder if need be; None at the first start.

    A restored record has `run_id` None if the tracking store does not know that run (the store may have been in the folder
    that is gone): then a new MLflow run begins.
    """
    record = folder.read_record() or folder.read_copied_record()
    if record is None or folder.record_file.is_file():
        return record
    assert record.run_id is not None
    try:
        if record.run_id.startswith(OFFLINE):
            raise UserError("the records of the offline run were lost with its folder")
        check_run_exists(store, record.run_id)
    except UserError as error:
        logger.warning(f"{error} The run continues with a new MLflow run")
        return record.model_copy(update={"run_id": None})
    record.write(folder.record_file)
    return record


@contextlib.contextmanager
def end_failed_runs(store: str, folders: Sequence[RunFolder]) -> Iterator[None]:
    """If the block fails, end the MLflow runs of folders without a result as FAILED or KILLED."""
    try:
        yield
    except BaseException as error:
        for folder in folders:
            record = folder.read_record()
            if record is not None and record.run_id is not None and not folder.result_file.is_file():
                run = TrackedRun(store, record.run_id, folder.path, resumed=True)
                run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", timeout=5)
        raise


def deliver_pending(store: str, folders: Sequence[RunFolder]) -> None:
    """Deliver records that workers left in outboxes; log how many still wait, for a later start."""
    for folder in folders:
        record = folder.read_record()
        if record is not None and record.run_id is not None and folder.has_undelivered():
            TrackedRun(store, record.run_id, folder.path, resumed=True).finish(None)
