"""Progress of anything long: a live bar on a terminal, a quiet line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from antdist.errors import redact

T = TypeVar("T")
QUIET_SECONDS = 15.0


_listeners: list[TextIO] = []


def say(message: str) -> None:
    """One line to standard error, where progress and notices go, without credentials in URIs; results go to standard
    output."""
    message = redact(message)
    print(message, file=sys.stderr, flush=True)
    for listener in _listeners:
        print(message, file=listener, flush=True)


@contextlib.contextmanager
def tee(listener: TextIO) -> Iterator[None]:
    """Within the block, what is said goes to `listener` too."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar (terminal) or a line every 15 seconds (log): items done, rate, time left."""
    if sys.stderr.isatty():
        yield from _bar(iterable, description, total)
    else:
        yield from _lines(iterable, description, total)


def _bar(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(iterable, description=description, total=total, console=Console(stderr=True), transient=True)


def _lines(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    for done, element in enumerate(iterable):
        now = time.monotonic()
        if now - last >= QUIET_SECONDS:
            last, rate = now, done / (now - start)
            left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
            say(f"{description}: {done}{f' of {total}' if total else ''}, {rate:.1f}/s{left}")
        yield element
