"""How a run goes right now: what a bar or a line of a log shows."""

from __future__ import annotations

from dataclasses import dataclass

from antdist.io.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Live:
    """How a run goes right now: `rate` in predictions a second, `wait` the share of time spent waiting for data, `left` in
    seconds."""

    name: str
    step: int
    steps: int
    loss: float
    rate: float
    wait: float
    left: float

    def line(self) -> str:
        return (
            f"{self.name}: step {self.step} of {self.steps}, loss {self.loss:.4f}, {self.rate:,.0f} predictions/s, "
            f"waited {self.wait:.1%} for data, {self.left / 60:.1f} min left"
        )


def log_line(live: Live) -> None:
    """The plain way to show how a run goes."""
    logger.info(live.line())
