"""The stream of global batches: auxiliary domains in, item ids out, the same for any number of ranks (architecture, law 1).

A domain is gone through in endless passes, each in another order (`order.py`). Epoch e takes units [e Q, (e + 1) Q) of a
domain with quota Q; with `mixing: 1` the quota is the whole domain, so a pass is an epoch. The domains' units of an
epoch are merged evenly, and batch k of K takes the k-th of K equal runs of them. All that is arithmetic on the
manifests: the stream starts at any batch by opening the shards that this batch needs.

Reading: a canonical stream goes through its shards a window at a time, and while one window is used, a thread reads the
next. So memory holds two windows a canonical stream: of a domain at most 2 x streams x window_shards shards, without
their times. A domain that is open whole, all its windows being first ones, is read once and kept from epoch to epoch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antdist import ragged
from antdist.batch import GlobalBatch, IntArray
from antdist.config.schema import StreamConfig
from antdist.data.domain import Domain
from antdist.data.places import RemotePath, fetch_files
from antdist.data.stream.order import CanonicalStream, canonical_streams, merge_counts, permutation, quotas
from antdist.data.stream.windows import PackedWindows, concatenate_windows, prefix_windows, user_windows
from antdist.errors import UserError

ORDER_VERSION = 1  # raise it when the same configuration comes to give another order
CHUNK = 4096  # units made into windows at once

Block = tuple[IntArray, NDArray[np.int32], int]  # offsets (U + 1,), items (T,), the global number of the first user


@dataclass(frozen=True)
class StreamState:
    """Where a run stands: `batch` is the next one of `epoch`. `order` holds all that the order is a function of; JSON."""

    order: dict[str, Any]
    epoch: int
    batch: int


class Stream:
    """Global batches of one or more domains.

    Args:
        domains: in the order that fixes the global ids of items and users.
        max_length: the most tokens a window has.
        seed: of the order.

    Raises:
        UserError: no domain, a domain twice, a domain with nothing to predict.
    """

    def __init__(self, domains: Sequence[Domain], config: StreamConfig, *, max_length: int, seed: int) -> None:
        _check_domains(domains)
        self.domains, self.config, self.max_length, self.seed = tuple(domains), config, max_length, seed
        manifests = [domain.manifest for domain in domains]
        self.item_offsets = ragged.offsets([m.items for m in manifests])
        self.user_offsets = ragged.offsets([m.users for m in manifests])
        predictions = [m.interactions - 3 * m.users for m in manifests]
        units = predictions if config.mode == "prefix" else [m.users for m in manifests]
        self._quotas = quotas(units, config.mixing)
        expected = [-(-q * p // u) for q, p, u in zip(self._quotas, predictions, units, strict=True)]
        if config.batches == "mixed":
            self._steps: tuple[int, ...] = (_steps(sum(expected), sum(self._quotas), config.batch_size),)
        else:
            self._steps = tuple(_steps(e, q, config.batch_size) for e, q in zip(expected, self._quotas, strict=True))
        self.steps_per_epoch = sum(self._steps)
        self.predictions_per_epoch = sum(expected)
        self._kept: dict[tuple[str, int], list[Block]] = {}  # the shards of small domains

    @property
    def order(self) -> dict[str, Any]:
        """All that the order of batches is a function of, epoch and number of the batch apart."""
        return {
            "order version": ORDER_VERSION,
            "domains": [[domain.name, domain.fingerprint] for domain in self.domains],
            "quotas": list(self._quotas),
            "seed": self.seed,
            "model.max_length": self.max_length,
            **{f"stream.{key}": value for key, value in self.config.model_dump(mode="json").items()},
        }

    def state(self, epoch: int, batch: int) -> StreamState:
        """What a checkpoint keeps; `batch` is the next one to give."""
        return StreamState(self.order, epoch, batch)

    def check_state(self, state: StreamState) -> None:
        """Raise UserError, saying what differs, unless `state` was made by a stream of the same order."""
        grown = {domain.name: domain.manifest.ancestors for domain in self.domains}
        differences = list(_differences(state.order, self.order, grown))
        if differences:
            raise UserError(
                f"the training state belongs to another stream of examples: {'; '.join(differences)}",
                remedy="resume with the data and configuration of the first start, or go on from the model on these data in a "
                "new run: name=NEW continue=MODEL",
            )
        if not (state.epoch >= 0 and 0 <= state.batch <= self.steps_per_epoch):
            raise UserError(
                f"the training state stands at batch {state.batch} of epoch {state.epoch}, "
                f"but an epoch has {self.steps_per_epoch} batches",
                remedy="resume from another checkpoint",
            )

    def check_ranks(self, world_size: int, accumulation: int = 1) -> None:
        """Raise UserError if the batch is too small to give every rank something in each micro-batch."""
        windows = sum(self._quotas) / self.steps_per_epoch / accumulation
        if windows < world_size:
            raise UserError(
                f"a micro-batch has {windows:.1f} windows on average, fewer than the {world_size} workers that share it",
                where="stream.batch_size",
                remedy="raise stream.batch_size, or lower ray.workers or training.accumulation",
            )

    def working_set_bytes(self) -> int:
        """Bytes of the remote shards that may be in use together on a node: of each canonical stream the window that the
        slowest rank reads, the one after it, and the one that the fastest reads ahead. Where the cache has room for them,
        each shard is fetched once a pass, for all ranks."""
        total = 0
        for domain in self.domains:
            if isinstance(domain.folder, RemotePath):
                sizes = sorted((shard.bytes for shard in domain.manifest.sequence_shards), reverse=True)
                total += sum(sizes[: 3 * self.config.streams * self.config.window_shards])
        return total

    def batches(self, epoch: int, start: int = 0) -> Generator[GlobalBatch, None, None]:
        """The batches of an epoch from number `start` on; `GlobalBatch.index` is the number.

        A batch whose users have nothing to predict (three interactions each; only where `batch_size` is tiny) is left
        out, its number too: go by `index`, not by counting. Whoever stops early closes the generator: shards are read
        ahead by a thread, which ends with it.
        """
        background = ThreadPoolExecutor(1, thread_name_prefix="shards")
        try:
            readers = [_DomainReader(self, d, background) for d in range(len(self.domains))]
            for index, spans in self._spans(epoch, start):
                pieces = [piece for d, first, last in spans for piece in readers[d].take(first, last)]
                batch = GlobalBatch(epoch=epoch, index=index, **concatenate_windows(pieces))
                if batch.predictions:
                    yield batch
        finally:
            background.shutdown(cancel_futures=True)

    def _blocks(self, d: int, shard: int) -> list[Block]:
        """A domain's shard. Its times are dropped, as nothing here reads them."""
        domain = self.domains[d]
        shards = domain.manifest.sequence_shards
        if kept := self._kept.get((domain.name, shard)):
            return kept
        blocks, first_user = [], int(self.user_offsets[d]) + shards[shard].first_user
        for block in domain.blocks(shard):
            blocks.append((block.offsets, block.items, first_user))
            first_user += len(block.offsets) - 1
        if len(shards) <= self.config.streams * self.config.window_shards:
            self._kept[domain.name, shard] = blocks
        return blocks

    def _bring(self, d: int, shards: Sequence[int]) -> None:
        """Have the shards of a remote domain fetched side by side."""
        domain = self.domains[d]
        there = domain.manifest.sequence_shards
        fetch_files(domain.folder, [there[shard] for shard in shards if (domain.name, shard) not in self._kept])

    def _spans(self, epoch: int, start: int) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
        """For each batch its number and, by domain, which of the domain's units (counted over all epochs) it takes."""
        assert epoch >= 0 and 0 <= start <= self.steps_per_epoch
        base = [epoch * q for q in self._quotas]
        if self.config.batches == "mixed":
            total, steps = sum(self._quotas), self.steps_per_epoch
            before = merge_counts(self._quotas, start * total // steps)
            for index in range(start, steps):
                after = merge_counts(self._quotas, (index + 1) * total // steps)
                yield (
                    index,
                    [(d, b + lo, b + hi) for d, (b, lo, hi) in enumerate(zip(base, before, after, strict=True))],
                )
                before = after
            return
        # Which domain each batch is of: every domain as often as it has steps, in an order drawn for the epoch.
        turns = np.repeat(np.arange(len(self._steps)), self._steps)
        turns = turns[permutation(len(turns), *(d.fingerprint for d in self.domains), self.seed, epoch, "turns")]
        done = np.bincount(turns[:start], minlength=len(self._steps)).tolist()
        for index in range(start, self.steps_per_epoch):
            d = int(turns[index])
            quota, steps = self._quotas[d], self._steps[d]
            yield index, [(d, base[d] + done[d] * quota // steps, base[d] + (done[d] + 1) * quota // steps)]
            done[d] += 1


class _DomainReader:
    """Takes units of a domain, numbered over all its passes, from front to back."""

    def __init__(self, stream: Stream, d: int, background: ThreadPoolExecutor) -> None:
        self.domain, self.stream, self.d, self.background = stream.domains[d], stream, d, background
        prefix = stream.config.mode == "prefix"
        self.units = [
            [block.interactions - 3 * block.users if prefix else block.users for block in shard.blocks]
            for shard in self.domain.manifest.sequence_shards
        ]
        self.size = sum(map(sum, self.units))
        self.number = -1  # of the pass that is open
        self.readers: list[_CanonicalReader] = []

    def take(self, first: int, last: int) -> Iterator[tuple[PackedWindows, int, int]]:
        while first < last:
            number, begin = divmod(first, self.size)
            end = min(begin + last - first, self.size)
            if number != self.number:
                self._open(number)
            sizes = [reader.layout.units for reader in self.readers]
            for reader, lo, hi in zip(self.readers, merge_counts(sizes, begin), merge_counts(sizes, end), strict=True):
                yield from reader.take(lo, hi)
            first += end - begin

    def _open(self, number: int) -> None:
        config = self.stream.config
        key = (self.domain.fingerprint, self.stream.seed, number)
        streams = canonical_streams(
            self.units,
            streams=config.streams,
            window_shards=config.window_shards,
            window_blocks=config.window_blocks,
            key=key,
        )
        self.number = number
        self.readers = [_CanonicalReader(self, layout, (*key, s)) for s, layout in enumerate(streams)]


class _CanonicalReader:
    """Takes units of one canonical stream of one pass. Holds two windows of shards, a group's columns, and a chunk's windows."""

    def __init__(self, domain: _DomainReader, layout: CanonicalStream, key: tuple[int | str, ...]) -> None:
        self.domain, self.layout, self.key = domain, layout, key
        self.max_length, self.prefix = domain.stream.max_length, domain.stream.config.mode == "prefix"
        self.window, self.group = -1, -1
        self.next: tuple[int, Future[dict[int, list[Block]]]] | None = None  # the window that is read ahead
        self.begin, self.end = 0, 0  # the units of the chunk

    def take(self, first: int, last: int) -> Iterator[tuple[PackedWindows, int, int]]:
        while first < last:
            if not self.begin <= first < self.end:
                self._open(first)
            end = min(last, self.end)
            yield self.windows, first - self.begin, end - self.begin
            first = end

    def _open(self, unit: int) -> None:
        """Make the chunk of windows that holds a unit, loading what it needs."""
        group = int(np.searchsorted(self.layout.starts, unit, side="right")) - 1
        if group != self.group:
            self._load_group(group)
        start = int(self.layout.starts[group])
        self.begin = start + (unit - start) // CHUNK * CHUNK
        self.end = min(self.begin + CHUNK, int(self.layout.starts[group + 1]))
        units = self.shuffle[self.begin - start : self.end - start]
        if self.prefix:
            user = np.searchsorted(self.predictions, units, side="right") - 1
            position = units - self.predictions[user] + 1
            self.windows = prefix_windows(self.items, self.starts[user], position, self.users[user], self.max_length)
        else:
            self.windows = user_windows(
                self.items, self.starts[units], self.lengths[units], self.users[units], self.max_length
            )

    def _load_window(self, window: int) -> None:
        """Take the window that was read ahead, and have the one after it read. What cannot be read is told here."""
        number, ahead = self.next or (None, None)
        self.next, self.shards = None, {}  # drop the old window before reading another
        self.shards = ahead.result() if ahead is not None and number == window else self._read(window)
        self.window = window
        if window + 1 < len(self.layout.windows):
            self.next = window + 1, self.domain.background.submit(self._read, window + 1)

    def _read(self, window: int) -> dict[int, list[Block]]:
        stream, d, shards = self.domain.stream, self.domain.d, self.layout.windows[window]
        stream._bring(d, shards)
        return {shard: stream._blocks(d, shard) for shard in shards}

    def _load_group(self, group: int) -> None:
        layout = self.layout.groups[group]
        if layout.window != self.window:
            self._load_window(layout.window)
        blocks = [self.shards[shard][block] for shard, block in layout.blocks]
        bases = ragged.offsets([len(items) for _, items, _ in blocks])
        self.items = np.concatenate([items for _, items, _ in blocks], dtype=np.int64)
        self.items += self.domain.stream.item_offsets[self.domain.d]
        self.starts = np.concatenate([o[:-1] + b for (o, _, _), b in zip(blocks, bases, strict=False)])
        self.lengths = np.concatenate([np.diff(o) for o, _, _ in blocks]) - 2  # less validation and test item
        self.users = np.concatenate([np.arange(first, first + len(o) - 1) for o, _, first in blocks])
        self.predictions = ragged.offsets(self.lengths - 1)
        self.shuffle = permutation(layout.units, *self.key, "units", group)
        self.group = group


def _steps(predictions: int, units: int, batch_size: int) -> int:
    """Batches an epoch: enough that the mean is no larger than `batch_size`, and each has a unit."""
    return min(-(-predictions // batch_size), units)


def _check_domains(domains: Sequence[Domain]) -> None:
    if not domains:
        raise UserError("no domain to train on", where="data.domains", remedy="name one prepared domain or more")
    names = [domain.name for domain in domains]
    for domain in domains:
        if names.count(domain.name) > 1:
            raise UserError(
                f"domain {domain.name!r} is named twice",
                where="data.domains",
                remedy="name each domain once; stream.mixing sets how often small domains are seen",
            )
        if domain.manifest.interactions <= 3 * domain.manifest.users:
            raise UserError(
                "there is nothing to learn from: no user has more than three interactions, "
                "of which the last two are kept for validation and test",
                where=domain.folder,
                remedy="leave the domain out, or prepare it from more interactions",
            )


def _differences(saved: dict[str, Any], here: dict[str, Any], grown: dict[str, list[str]]) -> Iterator[str]:
    """What differs, in words, saved value first; `grown` has the manifests that each domain has grown from."""
    then, now = dict(saved.get("domains", [])), dict(here["domains"])
    for name in sorted(then.keys() | now.keys()):
        if name not in now:
            yield f"domain {name!r} is gone"
        elif name not in then:
            yield f"domain {name!r} is new"
        elif then[name] != now[name]:
            became = "has grown" if then[name] in grown[name] else "was prepared anew"
            yield f"domain {name!r} {became} (manifest {then[name][:12]} then, {now[name][:12]} now)"
    if list(then) != list(now) and then.keys() == now.keys():
        yield f"the domains stand in another order ({', '.join(then)} then, {', '.join(now)} now)"
    other = sorted((saved.keys() | here.keys()) - {"domains", "quotas"})
    changed = [key for key in other if saved.get(key) != here.get(key)]
    for key in changed:
        yield f"{key} was {saved.get(key)!r}, is {here.get(key)!r}"
    if not changed and then == now and saved.get("quotas") != here["quotas"]:
        yield f"the quotas of the domains were {saved.get('quotas')!r}, are {here['quotas']!r}"
