"""Logging on standard error and in a run's log, without credentials."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from antdist.errors import redact

PACKAGE = logging.getLogger("antdist")


def get_logger(name: str) -> logging.Logger:
    """Return the standard logger of a module, with a filter that redacts credentials.

    The filter is on the logger and not on a handler, because a program that imports antdist may attach handlers of its own.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_redact_record)
    return logger


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), None
    return True


class StandardError(logging.Handler):
    """Print the message alone to the current `sys.stderr`, which progress bars and tests replace."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def setup_logging() -> None:
    """Report from INFO on to standard error.

    The command line and the workers call this; on import nothing is configured.
    """
    if not any(isinstance(handler, StandardError) for handler in PACKAGE.handlers):
        PACKAGE.addHandler(StandardError())
    PACKAGE.setLevel(logging.INFO)
    PACKAGE.propagate = False  # a handler of another package on the root logger would print each line a second time


class LogFile(logging.FileHandler):
    """A run's log. If it cannot be written, as on a full disk, one line says so and the run goes on without it."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            print(f"{self.baseFilename}: the log cannot be written ({sys.exc_info()[1]})", file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Within the block, append every message to `path`, too."""
    handler = LogFile(path, encoding="utf-8")
    PACKAGE.addHandler(handler)
    try:
        yield
    finally:
        PACKAGE.removeHandler(handler)
        handler.close()
