"""The leading worker logs to the run's folder; the driver shows that log and the status."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, TextColumn

from antdist.io.logs import get_logger, log_to_file
from antdist.io.progress import QUIET_SECONDS, make_bar
from antdist.runs.folder import RunFolder
from antdist.runs.locks import lock_leader
from antdist.training.status import Status

logger = get_logger(__name__)
POLL_SECONDS = 0.3
FIGURES_WIDTH = 74  # of the longest figures beside a bar, which has the rest of the terminal
WIDE = 120  # columns from which the bar also names the run


@contextlib.contextmanager
def lead(folder: RunFolder) -> Iterator[None]:
    """On the leading worker: lock the folder, and log to its `log.txt` too.

    Workers outlive a killed driver by some seconds, and must not write into what the next ones begin.

    Raises:
        UserError: earlier workers of this run do not end.
    """
    with log_to_file(folder.log_file), lock_leader(folder):
        yield


@contextlib.contextmanager
def follow(folder: RunFolder) -> Iterator[None]:
    """On the driver: show the log as it grows, and the status: a bar on a terminal, else a line at times."""
    stop = threading.Event()
    folder.log_file.touch()
    start = folder.log_file.stat().st_size
    folder.status_file.unlink(missing_ok=True)

    def poll(show: Callable[[Status], None]) -> None:
        shown: Status | None = None
        with folder.log_file.open(encoding="utf-8") as lines:
            lines.seek(start)
            while True:
                last = stop.is_set()
                for line in iter(lines.readline, ""):
                    logger.info(line.rstrip("\n"))
                status = folder.read_status()
                if status is not None and status != shown:
                    shown = status
                    show(status)
                if last:
                    return
                stop.wait(POLL_SECONDS)

    with _show_bar() if sys.stderr.isatty() else _show_lines() as show:
        thread = threading.Thread(target=poll, args=(show,), name="log", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextlib.contextmanager
def _show_lines() -> Iterator[Callable[[Status], None]]:
    last = -QUIET_SECONDS

    def show(status: Status) -> None:
        nonlocal last
        if time.monotonic() - last >= QUIET_SECONDS:
            last = time.monotonic()
            logger.info(status.line())

    yield show


@contextlib.contextmanager
def _show_bar() -> Iterator[Callable[[Status], None]]:
    width = Console(stderr=True).width
    bar = BarColumn(bar_width=max(4, min(40, width - FIGURES_WIDTH)))
    with make_bar(TextColumn("{task.description}"), bar, TextColumn("{task.fields[figures]}")) as progress:
        task = progress.add_task("starting the workers", total=None, figures="")

        def show(status: Status) -> None:
            name = status.name if width >= WIDE else ""
            progress.update(task, description=name, completed=status.step, total=status.steps, figures=status.figures())

        yield show
