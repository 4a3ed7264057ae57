"""Locks of a run's folder: for one command, or several on a trial each; for one leading worker.

A command holds `lock` exclusively. Commands that train one trial each hold the run's `lock` shared and their trial's `lock`
exclusively, so they run beside each other but not beside a command on the whole run. Locks are flock: the system releases them
when a process dies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from antdist.errors import UserError
from antdist.io.locks import try_lock
from antdist.io.logs import get_logger
from antdist.runs.folder import RunFolder

logger = get_logger(__name__)

# a killed command's workers end in seconds; those on a node that is cut off when Ray there has heard nothing for four minutes
EARLIER_WORKERS_SECONDS = 600.0
REPORT_SECONDS = 5.0


@contextlib.contextmanager
def lock_run(folder: RunFolder, trials: Sequence[RunFolder] = (), *, shared: bool = False) -> Iterator[None]:
    """Lock the run for this command, once the workers of earlier commands have ended.

    Args:
        trials: the trials that this command works on.
        shared: lock these trials alone; other commands may work on others of the same run.

    Raises:
        UserError: another command works on the run or on one of the trials; earlier workers do not end.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lock_command(folder, "run", shared))
        for trial in trials if shared else ():
            stack.enter_context(_lock_command(trial, "trial"))
        for each in (folder, *trials):
            if each.path.is_dir():
                with lock_leader(
                    each
                ):  # a killed command's workers outlive it by seconds, and write to the same outbox
                    pass
        yield


@contextlib.contextmanager
def lock_leader(folder: RunFolder) -> Iterator[None]:
    """Lock the folder for the leading worker. Raises UserError if that of an earlier command does not end."""
    first = min(REPORT_SECONDS, EARLIER_WORKERS_SECONDS)
    with contextlib.ExitStack() as stack:
        if not _lock(folder.leader_lock, stack, first):
            logger.warning(
                f"{folder.name}: earlier workers of this run are still at work: waiting until they have ended"
            )
            if not _lock(folder.leader_lock, stack, EARLIER_WORKERS_SECONDS - first):
                raise UserError("earlier workers of this run are still at work", where=folder, remedy="stop them")
        yield


@contextlib.contextmanager
def lock_files(folder: RunFolder) -> Iterator[None]:
    """Lock the files that commands on one run share: its configuration and its sources."""
    with contextlib.ExitStack() as stack:
        if not _lock(folder.files_lock, stack, EARLIER_WORKERS_SECONDS):
            raise UserError("another command holds the run's folder", where=folder, remedy="stop it")
        yield


@contextlib.contextmanager
def _lock_command(folder: RunFolder, what: str, shared: bool = False) -> Iterator[None]:
    folder.path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if not _lock(folder.command_lock, stack, shared=shared):
            raise UserError(
                f"another command is working on this {what}",
                where=folder,
                remedy="wait for it or stop it, or choose another name=...",
            )
        yield


def _lock(path: Path, stack: contextlib.ExitStack, seconds: float = 0.0, shared: bool = False) -> bool:
    """Try to lock a file within so many seconds; `stack` closes it, which releases the lock."""
    return try_lock(stack.enter_context(path.open("a+")), seconds=seconds, shared=shared)
