"""Skipped steps: which they are, what their batches held, and how many a run may skip.

A step whose loss or gradient is NaN or Inf on any rank changes nothing on all ranks (`Engine.update`), and the run
continues: one bad example must not cost a week. What the batch held is recorded in `skipped.jsonl` in the run's folder,
one line a step:

    {"step": 17, "epoch": 1, "batch": 16, "loss": "nan",
     "domains": {"office": {"sequences-000003.tar block-000012": [12301, ...]}}}

`step` counts from 1, as the curves do; users are numbered within their domain. If such steps are too frequent, the
model itself has diverged, and the run stops (`training.max_skipped`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from antdist import ragged
from antdist.batch import GlobalBatch, IntArray
from antdist.config.schema import TrainingConfig
from antdist.data.stream.stream import Stream
from antdist.io.files import write_atomically
from antdist.io.logs import get_logger
from antdist.training.divergence import Diverged
from antdist.training.meter import Window
from antdist.training.progress import Progress

logger = get_logger(__name__)

FILE = "skipped.jsonl"
WINDOW = 100  # times `training.max_skipped`: the number of recent steps among which that many may be skipped


@dataclass(frozen=True)
class SkipPolicy:
    """Finds skipped steps, records them in `skipped.jsonl`, and stops the run if there are too many."""

    name: str
    folder: Path
    stream: Stream
    config: TrainingConfig
    leader: bool

    def find(self, window: Window) -> Tensor:
        """Return (n,) which of the window's steps were skipped.

        Under fp16 an overflowing gradient alone does not count: the search for a loss scale skips such steps by design.
        """
        if self.config.precision == "fp16":
            return window.nonfinite & ~window.losses[:, 0].isfinite()
        return window.nonfinite

    def record(self, progress: Progress, window: Window, skipped: Tensor) -> None:
        """Record the skipped steps. Raises Diverged if there are too many, on all ranks."""
        for index in torch.nonzero(skipped).flatten().tolist():
            batch, loss = window.batches[index], float(window.losses[index, 0])
            step = batch.epoch * self.stream.steps_per_epoch + batch.index + 1
            progress.skipped.append(step)
            if self.leader:
                self._append(step, batch, loss)
                reason = "non-finite gradient" if math.isfinite(loss) else f"loss is {loss}"
                logger.warning(f"{self.name}: step {step} (epoch {batch.epoch + 1}) skipped: {reason}; see {FILE}")
        progress.skipped = recently_skipped(progress.skipped, progress.step, self.config.max_skipped)
        if len(progress.skipped) > self.config.max_skipped:
            raise self.too_many(progress)

    def too_many(self, progress: Progress) -> Diverged:
        """Return the error that ends the run: it names the steps."""
        consecutive, limit = consecutive_skips(progress), self.config.max_skipped
        if consecutive > 1 or not limit:
            since = f"since step {progress.step - max(consecutive, 1) + 1} (epoch {progress.epoch + 1})"
            what = f"the loss or its gradient is NaN or Inf {since}; {FILE} in the run's folder lists the data"
        else:
            what = (
                f"{len(progress.skipped)} of the last {WINDOW * limit} steps were skipped for a NaN or Inf loss or "
                f"gradient (up to step {progress.skipped[-1]}; {FILE} in the run's folder lists the data)"
            )
        return Diverged(what, self.name)

    def _append(self, step: int, batch: GlobalBatch, loss: float) -> None:
        line: dict[str, Any] = {"step": step, "epoch": batch.epoch + 1, "batch": batch.index, "loss": str(loss)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / FILE).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({**line, "domains": locate_users(self.stream, batch.users)}) + "\n")

    def forget_after(self, step: int) -> None:
        """Remove the records of later steps, which a run that resumes after `step` repeats."""
        file = self.folder / FILE
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            # a line cut short by a kill belongs to a step that is repeated
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            with write_atomically(file, sync="none") as partial:
                partial.write_text("".join(kept), encoding="utf-8")


def recently_skipped(skipped: Sequence[int], step: int, limit: int) -> list[int]:
    """Return the skipped steps (counted from 1) that still count after `step` steps."""
    return [each for each in skipped if each > step - max(WINDOW * limit, 1)]


def consecutive_skips(progress: Progress) -> int:
    """Count the consecutive skipped steps up to the current one."""
    skipped, run = set(progress.skipped), 0
    while progress.step - run in skipped:
        run += 1
    return run


def locate_users(stream: Stream, users: IntArray) -> dict[str, dict[str, list[int]]]:
    """Map global users to domain, then shard and block, then their numbers within the domain."""
    located: dict[str, dict[str, list[int]]] = {}
    for d, domain in enumerate(stream.domains):
        first, last = stream.user_offsets[d], stream.user_offsets[d + 1]
        own = np.unique(users[(users >= first) & (users < last)]) - first
        blocks = [(shard.name, block) for shard in domain.manifest.sequence_shards for block in shard.blocks]
        starts = ragged.offsets([block.users for _, block in blocks])
        for user, number in zip(own.tolist(), np.searchsorted(starts, own, side="right") - 1, strict=True):
            shard, block = blocks[number]
            located.setdefault(domain.name, {}).setdefault(f"{shard} {block.key}", []).append(user)
    return located
