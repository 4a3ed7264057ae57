"""Progress of anything long: a live bar on a terminal, a quiet line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from antdist.io.logs import get_logger

logger = get_logger(__name__)

T = TypeVar("T")
QUIET_SECONDS = 15.0


def track(
    iterable: Iterable[T], description: str, total: int | None = None, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Iterate with a bar (terminal) or a line every 15 seconds (log): how much is done, rate, time left.

    Args:
        total: of all sizes.
        size: of an element.
    """
    if sys.stderr.isatty():
        yield from _bar(iterable, description, total, size)
    else:
        yield from _lines(iterable, description, total, size)


def _bar(iterable: Iterable[T], description: str, total: int | None, size: Callable[[T], int]) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.1f}/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
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
