"""Requests to save a checkpoint or to stop: they reach any one rank, and all ranks follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Signal = Literal["save", "stop"]


class ControlSignals:
    """Exchanges requests among the ranks as one more row of the losses, without a further collective."""

    def __init__(self, poll: Callable[[], Signal | None]) -> None:
        self._poll = poll
        self._received: Signal | None = None

    def row_like(self, losses: Tensor) -> Tensor:
        """Return this rank's request as a (1, 4) row like those of `losses`, to be summed over ranks."""
        signal = self._poll()
        return torch.tensor([[signal == "stop", signal == "save", 0, 0]]).to(losses)

    def receive(self, total: Tensor) -> None:
        """Keep the request in the sum of all ranks' rows; stopping takes precedence over saving."""
        stop, save = total[:2].tolist()
        if stop:
            self._received = "stop"
        elif save:
            self._received = "save"

    def take(self) -> Signal | None:
        """Return the request received since the last call, the same on all ranks."""
        signal, self._received = self._received, None
        return signal
