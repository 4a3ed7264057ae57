"""What a rank reads ahead: the micro-batches of the next steps, dealt and with their features, made by a background thread.

Features lie where a step finds them soonest:

- with `negatives: catalogue` every step embeds the same items, the rank's share of the catalogue: they are looked up
  once and *held*;
- else, on a GPU with room for it, the whole catalogue is held there, and a micro-batch brings ids alone;
- else a micro-batch brings the rows of its own items, gathered from the memory map.

What goes from the host to a GPU is pinned in the background and copied while the step works.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from antdist import ragged
from antdist.batch import ROWS, Batch, GlobalBatch, IntArray, ItemInputs
from antdist.config.schema import LossConfig
from antdist.data.stream.shard_batch import partition_rows, shard_batch, split_batch
from antdist.data.stream.stream import Stream
from antdist.distributed.world import World

AHEAD = 2  # steps
HELD_SHARE = 0.2  # of a GPU's free memory, for features
END_SECONDS = 60.0  # that a thread in the middle of a read is given
HELD_CHUNK = 65536  # items brought to the device at once


class Features(Protocol):
    """Where the features of items come from (antdist.features.table.Catalogue, or a stand-in)."""

    @property
    def size(self) -> int:
        """Items under global ids 0 .. size - 1."""

    @property
    def dims(self) -> Mapping[str, int]:
        """Numbers an item has in each modality."""

    def features(self, item_ids: IntArray) -> ItemInputs:
        """The features of these items, a row each."""


@dataclass(frozen=True)
class Micro:
    """One micro-batch of this rank, ready for the device (`Feed.bring`); `weight` is its part of the step's predictions.

    `features` are those of the rank's share of the items, some of the last one's following to fill up (`ROWS`); None where
    the device holds the catalogue's. They may be the same tensors at every step: read only.
    """

    batch: Batch
    features: ItemInputs | None
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
        """Split into micro-batches, take this rank's share, look up its items' features."""
        step = batch.epoch * self.stream.steps_per_epoch + batch.index
        micros = [m for m in split_batch(batch, self.accumulation) if m.predictions]
        return StepInput(step, batch, [self._micro(m, batch.predictions, step, i) for i, m in enumerate(micros)])

    def _micro(self, micro: GlobalBatch, predictions: int, step: int, index: int) -> Micro:
        dealt = shard_batch(
            micro,
            rank=self.world.rank,
            world_size=self.world.size,
            candidates=self.loss.negatives,
            catalogue_size=self.catalogue.size,
            samples=self.loss.samples,
            log_q=self.loss.log_q,
            cumulative_counts=self._heaps,
            seed=self.seed,
            step=step * self.accumulation + index,
        )
        features: ItemInputs | None
        if self.loss.negatives == "catalogue":
            features = self.held
        elif self.held is not None:
            features = None
        else:
            features = self._pinned(self.catalogue.features(_filled(dealt).numpy()))
        return Micro(self._pinned(dealt), features, micro.predictions / predictions)

    def bring(self, micro: Micro) -> tuple[Batch, ItemInputs]:
        """A micro-batch and its features on the rank's device; copies from pinned memory are not waited for."""
        batch = micro.batch.to(self.world.device)
        if micro.features is not None:
            return batch, micro.features.to(self.world.device)
        assert self.held is not None
        return batch, look_up(self.held, _filled(batch))

    @cached_property
    def held(self) -> ItemInputs | None:
        """Features that outlive the step: of this rank's share of the catalogue where that is what a step embeds, else of
        the whole catalogue where the device has room for it, else None. On the device if they fit, else on the host."""
        same_items = self.loss.negatives == "catalogue"
        size = self.catalogue.size
        first, last = partition_rows(size, self.world.rank, self.world.size) if same_items else (0, size)
        # 4 bytes a number, one a presence, 8 an id
        item_bytes = sum(4 * dim + 1 for dim in self.catalogue.dims.values()) + 8
        fits = (last - first) * item_bytes <= room(self.world.device)
        if not same_items and not fits:
            return None
        if not fits:
            return self._pinned(self.catalogue.features(np.arange(first, last)))
        starts = range(first, max(last, first + 1), HELD_CHUNK)
        parts = [self.catalogue.features(np.arange(i, min(i + HELD_CHUNK, last))).to(self.world.device) for i in starts]
        return ItemInputs(
            {m: torch.cat([part.values[m] for part in parts]) for m in self.catalogue.dims},
            {m: torch.cat([part.present[m] for part in parts]) for m in self.catalogue.dims},
            torch.cat([part.index for part in parts]),
        )

    @cached_property
    def _heaps(self) -> IntArray:
        return ragged.offsets(self.popularity + 1)

    def _pinned(self, value: Any) -> Any:
        """A `Batch` or `ItemInputs` in memory that a GPU copies from by itself; where there is no GPU, as it is."""
        return value if self.world.device.type == "cpu" else _each_tensor(value, Tensor.pin_memory)

    def epoch(self, epoch: int, start: int) -> Iterator[StepInput]:
        """The inputs of an epoch's steps from batch `start` on, read ahead by a thread."""
        return _ahead(self._inputs(epoch, start))

    def _inputs(self, epoch: int, start: int) -> Generator[StepInput, None, None]:
        if self.world.device.index is not None:
            torch.cuda.set_device(self.world.device)  # each thread has its own, and pins memory for it
        with closing(self.stream.batches(epoch, start)) as batches:
            for batch in batches:
                yield self.inputs(batch)


def room(device: torch.device) -> float:
    """Bytes for held features that a device has. None on a CPU: there the memory map is as near as a copy of it."""
    return 0.0 if device.type == "cpu" else HELD_SHARE * torch.cuda.mem_get_info(device)[0]


def _filled(batch: Batch) -> Tensor:
    """The ids of the items that this rank embeds, the last one repeated up to a multiple of `ROWS`."""
    item_ids = batch.item_ids[slice(*batch.share)]
    return torch.cat([item_ids, item_ids[-1:].expand(-len(item_ids) % ROWS)])


def look_up(table: ItemInputs, item_ids: Tensor) -> ItemInputs:
    """Rows of a table of the whole catalogue, by global id, on the table's device: what `Features.features` gives."""
    return _each_tensor(table, lambda rows: rows.index_select(0, item_ids))


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A `Batch` or `ItemInputs` with each tensor changed."""

    def changed(field: Any) -> Any:
        if isinstance(field, dict):
            return {name: change(tensor) for name, tensor in field.items()}
        return change(field) if isinstance(field, Tensor) else field

    return replace(value, **{name: changed(field) for name, field in vars(value).items()})


def _ahead(source: Generator[StepInput, None, None]) -> Iterator[StepInput]:
    """The same elements, made up to `AHEAD` in advance; an error in the thread is raised here. Closing it ends the thread."""
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
            with closing(source):
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
        thread.join(END_SECONDS)  # it may hang on storage that is gone
