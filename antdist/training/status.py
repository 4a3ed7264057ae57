"""The status of a run while it trains: what a progress bar or a log line shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from antdist.io.logs import get_logger

logger = get_logger(__name__)

INTERVAL_SECONDS = 1.0


@dataclass(frozen=True)
class Status:
    """A run's step, loss and speed at one moment."""

    name: str
    step: int
    steps: int
    loss: float
    rate: float  # predictions a second
    wait: float  # the share of time spent waiting for data
    left: float  # seconds

    def figures(self) -> str:
        """Format all but the name: `step 20/576  loss 7.42  32.8k pred/s  data wait 0.1%  eta 0:42`."""
        minutes, seconds = divmod(round(self.left), 60)
        eta = f"{minutes}:{seconds:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.4g}  {_short(self.rate)} pred/s  "
            f"data wait {self.wait:.1%}  eta {eta}"
        )

    def line(self) -> str:
        """Format the status as one line of a log."""
        return f"{self.name}: {self.figures()}"


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate < 1e3 else f"{rate / 1e3:.1f}k" if rate < 1e6 else f"{rate / 1e6:.1f}M"


def log_status(status: Status) -> None:
    """Log the status as a line."""
    logger.info(status.line())


class StatusReporter:
    """Shows a run's status, at most once a second; estimates the time left from the steps of this process."""

    def __init__(self, name: str, show: Callable[[Status], None], first_step: int, steps: int) -> None:
        self._name, self._show, self._first_step, self._steps = name, show, first_step, steps
        self._begun = self._shown = time.perf_counter()

    def report(self, step: int, loss: float, rate: float, wait: float) -> None:
        now = time.perf_counter()
        if now - self._shown < INTERVAL_SECONDS:
            return
        self._shown = now
        left = (self._steps - step) * (now - self._begun) / (step - self._first_step)
        self._show(Status(self._name, step, self._steps, loss, rate, wait, left))
