"""Loss accumulation: losses stay on the device until a point of the curves is due."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from antdist.batch import GlobalBatch
from antdist.distributed.world import World, sum_over_ranks
from antdist.profiling import trace_part
from antdist.training.feed import StepInput
from antdist.training.memory import trim_periodically
from antdist.training.signals import ControlSignals


@dataclass(frozen=True)
class Window:
    """The steps since the last point of the curves, their losses summed over ranks, on the host."""

    batches: list[GlobalBatch]
    losses: Tensor  # (n, 3) float64: total, recommendation, alignment
    nonfinite: Tensor  # (n,) bool: the update was skipped for a NaN or Inf gradient
    predictions_per_s: float
    data_wait: float  # the share of time spent waiting for data

    def weights(self, skipped: Tensor) -> Tensor:
        """Return (n,) float64, the steps' weights in a mean: their predictions, 0 for skipped steps."""
        return _predictions(self.batches) * ~skipped

    def mean_losses(self, skipped: Tensor, weights: Tensor) -> tuple[float, float, float]:
        """Average total, recommendation and alignment loss over the predictions of the steps kept."""
        sums = (self.losses[~skipped] * weights[~skipped, None]).sum(0)  # without the NaN of skipped steps
        total, recommendation, alignment = (sums / weights.sum()).tolist()
        return total, recommendation, alignment


class LossMeter:
    """Collects losses without a synchronisation a step; measures throughput and the wait for data."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: list[tuple[Tensor, GlobalBatch]] = []
        self._waited, self._since = 0.0, 0.0

    @property
    def is_empty(self) -> bool:
        return not self._pending

    def add(self, losses: Tensor, batch: GlobalBatch) -> None:
        """Keep a step's (4,) losses, this rank's part of them, as `Trainer.step` returns them."""
        self._pending.append((losses, batch))

    def measure_wait(self, inputs: Iterator[StepInput]) -> Iterator[StepInput]:
        """Yield the same inputs and measure the time spent waiting for them."""
        self._restart_clock()  # what happens between two epochs is not training
        while True:
            begun = time.perf_counter()
            with trace_part("wait for data"):
                step_input = next(inputs, None)
            self._waited += time.perf_counter() - begun
            if step_input is None:
                return
            yield step_input

    def reduce(self, signals: ControlSignals) -> Window:
        """Sum the pending losses over ranks, and exchange control signals with them. Collective.

        One collective and one copy from the device serve all pending steps.
        """
        row = signals.row_like(self._pending[0][0])
        rows = sum_over_ranks(self._world, torch.cat([torch.stack([losses for losses, _ in self._pending]), row]))
        rows = rows.double().cpu()
        signals.receive(rows[-1])
        trim_periodically()
        batches = [batch for _, batch in self._pending]
        elapsed = time.perf_counter() - self._since
        rate = float(_predictions(batches).sum()) / elapsed
        return Window(batches, rows[:-1, :3], rows[:-1, 3] > 0, rate, self._waited / elapsed)

    def restart(self) -> None:
        """Drop the pending losses and restart the clock, once the point is reported."""
        self._pending.clear()
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._waited, self._since = 0.0, time.perf_counter()


def _predictions(batches: list[GlobalBatch]) -> Tensor:
    return torch.tensor([batch.predictions for batch in batches], dtype=torch.float64)
