"""The input of each step: this rank's micro-batches with item features, prefetched by a thread.

Where a step finds its features:

- with `negatives: catalogue` every step embeds the same items, the rank's share of the catalogue: their features are
  looked up once and *cached*;
- else, on a GPU with enough memory, those of the whole catalogue are cached there, and a micro-batch has ids only;
- else a micro-batch has the rows of its own items, gathered from the memory map.

Copies to a GPU start from pinned memory, filled in the background, and overlap with the step.
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

PREFETCHED_STEPS = 2
CACHE_SHARE = 0.2  # of a GPU's free memory, for features
CACHE_CHUNK = 65536  # items copied to the device at once
JOIN_SECONDS = 60.0  # for the thread to finish a read


class FeatureSource(Protocol):
    """Looks up item features (`antdist.features.catalogue.Catalogue`, or a substitute in tests)."""

    @property
    def size(self) -> int:
        """The number of items; their global ids are 0 .. size - 1."""

    @property
    def dims(self) -> Mapping[str, int]:
        """The feature dimension of each modality."""

    def features(self, item_ids: IntArray) -> ItemInputs:
        """Return the features of these items, one row each."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of this rank on the host; `weight` is its part of the step's predictions.

    `features` are those of the rank's share of the items, the last one repeated as padding (`ROWS`); None if the device
    caches those of the whole catalogue. They may be the same tensors in every step: do not modify them.
    """

    batch: Batch
    features: ItemInputs | None
    weight: float


@dataclass(frozen=True)
class StepInput:
    """The input of one optimizer step on this rank. `step` counts from the start of the run."""

    step: int
    batch: GlobalBatch
    micro_batches: list[MicroBatch]


@dataclass(frozen=True)
class Feed:
    """Turns global batches into a rank's inputs."""

    stream: Stream
    catalogue: FeatureSource
    loss: LossConfig
    popularity: IntArray
    accumulation: int
    seed: int
    world: World

    def inputs(self, batch: GlobalBatch) -> StepInput:
        """Split into micro-batches, take this rank's share of each, and look up the features of its items."""
        step = batch.epoch * self.stream.steps_per_epoch + batch.index
        micros = [m for m in split_batch(batch, self.accumulation) if m.predictions]
        return StepInput(step, batch, [self._micro_batch(m, batch.predictions, step, i) for i, m in enumerate(micros)])

    def _micro_batch(self, micro: GlobalBatch, predictions: int, step: int, index: int) -> MicroBatch:
        own = shard_batch(
            micro,
            rank=self.world.rank,
            world_size=self.world.size,
            candidates=self.loss.negatives,
            catalogue_size=self.catalogue.size,
            samples=self.loss.samples,
            log_q=self.loss.log_q,
            cumulative_counts=self._cumulative_counts,
            seed=self.seed,
            step=step * self.accumulation + index,
        )
        features: ItemInputs | None
        if self.loss.negatives == "catalogue":
            features = self.cached_features
        elif self.cached_features is not None:
            features = None
        else:
            features = self._pinned(self.catalogue.features(_padded_ids(own).numpy()))
        return MicroBatch(self._pinned(own), features, micro.predictions / predictions)

    def to_device(self, micro: MicroBatch) -> tuple[Batch, ItemInputs]:
        """Copy a micro-batch and its features to the rank's device, asynchronously from pinned memory."""
        batch = micro.batch.to(self.world.device)
        if micro.features is not None:
            return batch, micro.features.to(self.world.device)
        assert self.cached_features is not None
        return batch, select_rows(self.cached_features, _padded_ids(batch))

    @cached_property
    def cached_features(self) -> ItemInputs | None:
        """Features kept from step to step, on the device if they fit, else on the host.

        Those of the rank's share of the catalogue if every step embeds that; else those of the whole catalogue if they
        fit on the device; else None.
        """
        same_items = self.loss.negatives == "catalogue"
        size = self.catalogue.size
        first, last = partition_rows(size, self.world.rank, self.world.size) if same_items else (0, size)
        # 4 bytes per number, 1 per presence flag, 8 per id
        item_bytes = sum(4 * dim + 1 for dim in self.catalogue.dims.values()) + 8
        fits = (last - first) * item_bytes <= cache_budget(self.world.device)
        if not same_items and not fits:
            return None
        if not fits:
            return self._pinned(self.catalogue.features(np.arange(first, last)))
        starts = range(first, max(last, first + 1), CACHE_CHUNK)
        parts = [
            self.catalogue.features(np.arange(i, min(i + CACHE_CHUNK, last))).to(self.world.device) for i in starts
        ]
        return ItemInputs(
            {m: torch.cat([part.values[m] for part in parts]) for m in self.catalogue.dims},
            {m: torch.cat([part.present[m] for part in parts]) for m in self.catalogue.dims},
            torch.cat([part.index for part in parts]),
        )

    @cached_property
    def _cumulative_counts(self) -> IntArray:
        return ragged.offsets(self.popularity + 1)

    def _pinned(self, value: Any) -> Any:
        """A `Batch` or `ItemInputs` in pinned memory; on a CPU unchanged."""
        return value if self.world.device.type == "cpu" else _map_tensors(value, Tensor.pin_memory)

    def epoch(self, epoch: int, start: int) -> Iterator[StepInput]:
        """Return the inputs of an epoch's steps from batch `start` on, prefetched by a thread."""
        return _prefetched(self._inputs(epoch, start))

    def _inputs(self, epoch: int, start: int) -> Generator[StepInput, None, None]:
        if self.world.device.index is not None:
            torch.cuda.set_device(self.world.device)  # the current device is per thread; memory is pinned for it
        with closing(self.stream.batches(epoch, start)) as batches:
            for batch in batches:
                yield self.inputs(batch)


def cache_budget(device: torch.device) -> float:
    """Return a device's bytes for cached features. 0 on CPU: the memory map is as fast as a copy."""
    return 0.0 if device.type == "cpu" else CACHE_SHARE * torch.cuda.mem_get_info(device)[0]


def _padded_ids(batch: Batch) -> Tensor:
    """The ids of the items that this rank embeds, the last one repeated up to a multiple of `ROWS`."""
    item_ids = batch.item_ids[slice(*batch.share)]
    return torch.cat([item_ids, item_ids[-1:].expand(-len(item_ids) % ROWS)])


def select_rows(table: ItemInputs, item_ids: Tensor) -> ItemInputs:
    """Select rows by global id from the features of the whole catalogue."""
    return _map_tensors(table, lambda rows: rows.index_select(0, item_ids))


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to each tensor of a `Batch` or `ItemInputs`."""

    def apply(field: Any) -> Any:
        if isinstance(field, dict):
            return {name: function(tensor) for name, tensor in field.items()}
        return function(field) if isinstance(field, Tensor) else field

    return replace(value, **{name: apply(field) for name, field in vars(value).items()})


def _prefetched(source: Generator[StepInput, None, None]) -> Iterator[StepInput]:
    """Yield from `source`, which a thread runs ahead; closing the iterator ends the thread."""
    ready: queue.Queue[StepInput | BaseException | None] = queue.Queue(PREFETCHED_STEPS)
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
        thread.join(JOIN_SECONDS)  # it may hang on lost storage
