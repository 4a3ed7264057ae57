"""What a rank reads ahead: the micro-batches of the next steps, dealt and with their features, made by a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from antdist.batch import Batch, GlobalBatch, IntArray, ItemFeatures
from antdist.config.schema import LossConfig
from antdist.data.deal import deal
from antdist.data.stream import Stream, split
from antdist.training.world import World

AHEAD = 2  # steps


class Features(Protocol):
    """Where the features of items come from (antdist.features.table.Catalogue, or a stand-in)."""

    @property
    def size(self) -> int:
        """Items under global ids 0 .. size - 1."""

    def features(self, item_ids: IntArray) -> ItemFeatures:
        """The features of these items, a row each."""


@dataclass(frozen=True)
class Micro:
    """One micro-batch of this rank, ready for the device; `weight` is its part of the step's predictions."""

    batch: Batch
    features: ItemFeatures
    weight: float


@dataclass(frozen=True)
class StepInput:
    """All that one optimizer step needs on this rank. `step` counts from the first epoch on."""

    step: int
    whole: GlobalBatch
    micros: list[Micro]


@dataclass(frozen=True)
class Feed:
    """How global batches become a rank's inputs."""

    stream: Stream
    catalogue: Features
    loss: LossConfig
    popularity: IntArray
    accumulation: int
    seed: int
    world: World

    def inputs(self, batch: GlobalBatch) -> StepInput:
        """Split into micro-batches, deal this rank its share, look its items' features up."""
        step = batch.epoch * self.stream.steps_per_epoch + batch.index
        micros = [m for m in split(batch, self.accumulation) if m.predictions]
        return StepInput(step, batch, [self._micro(m, batch.predictions, step, i) for i, m in enumerate(micros)])

    def _micro(self, micro: GlobalBatch, predictions: int, step: int, index: int) -> Micro:
        dealt = deal(
            micro,
            rank=self.world.rank,
            world_size=self.world.size,
            candidates=self.loss.negatives,
            catalogue_size=self.catalogue.size,
            samples=self.loss.samples,
            log_q=self.loss.log_q,
            popularity=self.popularity,
            seed=self.seed,
            step=step * self.accumulation + index,
        )
        mine = dealt.item_ids[slice(*dealt.share)]
        return Micro(dealt, self.catalogue.features(np.asarray(mine)), micro.predictions / predictions)

    def epoch(self, epoch: int, start: int) -> Iterator[StepInput]:
        """The inputs of an epoch's steps from batch `start` on, read ahead by a thread."""
        return _ahead(self.inputs(batch) for batch in self.stream.batches(epoch, start))


def _ahead(source: Iterator[StepInput]) -> Iterator[StepInput]:
    """The same elements, made up to `AHEAD` in advance; an error in the thread is raised here."""
    ready: queue.Queue[StepInput | BaseException | None] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def offer(element: StepInput | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(element, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for element in source:
                if not offer(element):
                    return
            offer(None)
        except BaseException as error:
            offer(error)

    thread = threading.Thread(target=work, name="feed", daemon=True)
    thread.start()
    try:
        while (element := ready.get()) is not None:
            if isinstance(element, BaseException):
                raise element
            yield element
    finally:
        stopped.set()
        thread.join()
