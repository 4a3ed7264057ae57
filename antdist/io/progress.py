"""Progress bars, or a line now and then off a terminal; tables of plain text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from antdist.io.logs import get_logger

logger = get_logger(__name__)

T = TypeVar("T")
QUIET_SECONDS = 15.0


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows of equal length as lines of columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def make_bar(*columns: Any) -> Any:
    """Make a rich `Progress` on standard error that disappears at its end.

    Lines logged meanwhile appear above it.
    """
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stderr=True)


def track(
    iterable: Iterable[T], description: str, total: int | None = None, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Iterate, and show progress, rate and time left.

    A terminal shows a bar, anything else a line every 15 seconds.

    Args:
        total: the sum of all sizes.
        size: the size of an element; 1 if not given.
    """
    if sys.stderr.isatty():
        yield from _bar(iterable, description, total, size)
    else:
        yield from _lines(iterable, description, total, size)


def _bar(iterable: Iterable[T], description: str, total: int | None, size: Callable[[T], int]) -> Iterator[T]:
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.1f}/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with make_bar(*columns) as progress:
        bar = progress.add_task(description, total=total)
        for element in iterable:
            progress.advance(bar, size(element))
            yield element


def _lines(iterable: Iterable[T], description: str, total: int | None, size: Callable[[T], int]) -> Iterator[T]:
    start = last = time.monotonic()
    done = 0
    for element in iterable:
        now = time.monotonic()
        if now - last >= QUIET_SECONDS:
            last, rate = now, done / (now - start)
            left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
            logger.info(f"{description}: {done}{f' of {total}' if total else ''}, {rate:.1f}/s{left}")
        yield element
        done += size(element)
