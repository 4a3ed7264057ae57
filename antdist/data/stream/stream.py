"""The stream of global batches, equal for any number of ranks (docs/architecture.md, law 1).

A domain is read in endless passes, each in another order (`order.py`). Epoch e takes units [e Q, (e + 1) Q) of a domain
with quota Q; with `mixing: 1` the quota is the whole domain, so a pass is an epoch. The domains' units of an epoch are
merged evenly, and batch k of K takes the k-th of K equal runs of them. All of this is arithmetic on the manifests: the
stream starts at any batch by opening only the shards that this batch needs.

Reading: a canonical stream reads its shards one window at a time; while a window is used, a thread reads the next. So
memory holds two windows a canonical stream: of a domain at most 2 x streams x window_shards shards, without their times.
A small domain whose shards all fit into the first windows is read once and kept from epoch to epoch.
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
from antdist.data.shards import HELD_OUT
from antdist.data.stream.order import CanonicalStream, canonical_streams, merge_counts, permutation, quotas
from antdist.data.stream.windows import PackedWindows, concatenate_windows, prefix_windows, user_windows
from antdist.errors import UserError

ORDER_VERSION = 1  # increase it when the same configuration gives another order
CHUNK = 4096  # units that are cut into windows at once

Block = tuple[IntArray, NDArray[np.int32], int]  # offsets (U + 1,), items (T,), global number of the first user


@dataclass(frozen=True)
class StreamState:
    """The position of a run: `batch` is the next one of `epoch`; `order`, as JSON, defines the order."""

    order: dict[str, Any]
    epoch: int
    batch: int


class Stream:
    """Global batches of one or more domains.

    Args:
        domains: in the order that defines the global ids of items and users.
        max_length: tokens of a window, at most.
        seed: of the order.

    Raises:
        UserError: there is no domain, a domain occurs twice, or a domain has nothing to predict.
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
        self._cached: dict[tuple[str, int], list[Block]] = {}  # the shards of small domains

    @property
    def order(self) -> dict[str, Any]:
        """Return everything that defines the order of batches within an epoch."""
        return {
            "order version": ORDER_VERSION,
            "domains": [[domain.name, domain.fingerprint] for domain in self.domains],
            "quotas": list(self._quotas),
            "seed": self.seed,
            "model.max_length": self.max_length,
            **{f"stream.{key}": value for key, value in self.config.model_dump(mode="json").items()},
        }

    def state(self, epoch: int, batch: int) -> StreamState:
        """Return the state for a checkpoint; `batch` is the next one to read."""
        return StreamState(self.order, epoch, batch)

    def check_state(self, state: StreamState) -> None:
        """Check that `state` is of a stream of the same order. Raises UserError that lists the differences."""
        ancestors = {domain.name: domain.manifest.ancestors for domain in self.domains}
        differences = list(_describe_differences(state.order, self.order, ancestors))
        if differences:
            raise UserError(
                f"the training state belongs to another stream of examples: {'; '.join(differences)}",
                remedy="resume with the original data and configuration, or continue from the model in a new run with "
                "name=NEW continue=MODEL",
            )
        if not (state.epoch >= 0 and 0 <= state.batch <= self.steps_per_epoch):
            raise UserError(
                f"the training state is at batch {state.batch} of epoch {state.epoch}, "
                f"but an epoch has {self.steps_per_epoch} batches",
                remedy="resume from another checkpoint",
            )

    def check_ranks(self, world_size: int, accumulation: int = 1) -> None:
        """Check that a micro-batch has a window for every rank on average. Raises UserError."""
        windows = sum(self._quotas) / self.steps_per_epoch / accumulation
        if windows < world_size:
            raise UserError(
                f"a micro-batch has {windows:.1f} windows on average, fewer than the {world_size} workers that share it",
                where="stream.batch_size",
                remedy="raise stream.batch_size, or lower ray.workers or training.accumulation",
            )

    def working_set_bytes(self) -> int:
        """Return the bytes of remote shards that the ranks of a node may use together.

        These are, of each canonical stream, the window that the slowest rank reads, the next one, and the one that the
        fastest rank reads ahead. If the cache holds them, each shard is fetched once a pass, for all ranks.
        """
        total = 0
        for domain in self.domains:
            if isinstance(domain.folder, RemotePath):
                sizes = sorted((shard.bytes for shard in domain.manifest.sequence_shards), reverse=True)
                total += sum(sizes[: 3 * self.config.streams * self.config.window_shards])
        return total

    def batches(self, epoch: int, start: int = 0) -> Generator[GlobalBatch, None, None]:
        """Read the batches of an epoch from number `start` on; `GlobalBatch.index` is the number.

        A batch without predictions (its users have three interactions each; only with a tiny `batch_size`) is skipped
        together with its number, so rely on `index` instead of counting. Close the generator to stop early: that ends the
        thread that reads ahead.
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
        """Read a shard of a domain, without times."""
        domain = self.domains[d]
        shards = domain.manifest.sequence_shards
        if cached := self._cached.get((domain.name, shard)):
            return cached
        blocks, first_user = [], int(self.user_offsets[d]) + shards[shard].first_user
        for block in domain.blocks(shard):
            blocks.append((block.offsets, block.items, first_user))
            first_user += len(block.offsets) - 1
        if len(shards) <= self.config.streams * self.config.window_shards:
            self._cached[domain.name, shard] = blocks
        return blocks

    def _fetch(self, d: int, shards: Sequence[int]) -> None:
        """Fetch shards of a remote domain in parallel."""
        domain = self.domains[d]
        stored = domain.manifest.sequence_shards
        fetch_files(domain.folder, [stored[shard] for shard in shards if (domain.name, shard) not in self._cached])

    def _spans(self, epoch: int, start: int) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
        """Give each batch's number and its units (domain, first, last), counted over all epochs."""
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
        # The domain of each batch: every domain as often as it has steps, in an order drawn for the epoch.
        turns = np.repeat(np.arange(len(self._steps)), self._steps)
        turns = turns[permutation(len(turns), *(d.fingerprint for d in self.domains), self.seed, epoch, "turns")]
        done = np.bincount(turns[:start], minlength=len(self._steps)).tolist()
        for index in range(start, self.steps_per_epoch):
            d = int(turns[index])
            quota, steps = self._quotas[d], self._steps[d]
            yield index, [(d, base[d] + done[d] * quota // steps, base[d] + (done[d] + 1) * quota // steps)]
            done[d] += 1


class _DomainReader:
    """Reads units of a domain, numbered over all its passes, from front to back."""

    def __init__(self, stream: Stream, d: int, background: ThreadPoolExecutor) -> None:
        self.domain, self.stream, self.d, self.background = stream.domains[d], stream, d, background
        prefix = stream.config.mode == "prefix"
        self.units = [
            [block.interactions - 3 * block.users if prefix else block.users for block in shard.blocks]
            for shard in self.domain.manifest.sequence_shards
        ]
        self.size = sum(map(sum, self.units))
        self.number = -1  # of the current pass
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
    """Reads units of one canonical stream of one pass.

    It holds two windows of shards, the columns of a group, and the windows cut from a chunk of units.
    """

    def __init__(self, domain: _DomainReader, layout: CanonicalStream, key: tuple[int | str, ...]) -> None:
        self.domain, self.layout, self.key = domain, layout, key
        self.max_length, self.prefix = domain.stream.max_length, domain.stream.config.mode == "prefix"
        self.window, self.group = -1, -1
        self.next: tuple[int, Future[dict[int, list[Block]]]] | None = None  # the window that is being read ahead
        self.begin, self.end = 0, 0  # the units of the current chunk

    def take(self, first: int, last: int) -> Iterator[tuple[PackedWindows, int, int]]:
        while first < last:
            if not self.begin <= first < self.end:
                self._open(first)
            end = min(last, self.end)
            yield self.windows, first - self.begin, end - self.begin
            first = end

    def _open(self, unit: int) -> None:
        """Cut the chunk that contains the unit into windows, loading what it needs."""
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
        """Take the window that was read ahead, or raise its error, and start to read the next."""
        number, ahead = self.next or (None, None)
        self.next, self.shards = None, {}  # drop the old window before reading another
        self.shards = ahead.result() if ahead is not None and number == window else self._read(window)
        self.window = window
        if window + 1 < len(self.layout.windows):
            self.next = window + 1, self.domain.background.submit(self._read, window + 1)

    def _read(self, window: int) -> dict[int, list[Block]]:
        stream, d, shards = self.domain.stream, self.domain.d, self.layout.windows[window]
        stream._fetch(d, shards)
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
        self.lengths = np.concatenate([np.diff(o) for o, _, _ in blocks]) - HELD_OUT
        self.users = np.concatenate([np.arange(first, first + len(o) - 1) for o, _, first in blocks])
        self.predictions = ragged.offsets(self.lengths - 1)
        self.shuffle = permutation(layout.units, *self.key, "units", group)
        self.group = group


def _steps(predictions: int, units: int, batch_size: int) -> int:
    """Compute the batches of an epoch: enough for a mean of at most `batch_size`, at most one a unit."""
    return min(-(-predictions // batch_size), units)


def _check_domains(domains: Sequence[Domain]) -> None:
    if not domains:
        raise UserError("no domain to train on", where="data.domains", remedy="name at least one prepared domain")
    names = [domain.name for domain in domains]
    for domain in domains:
        if names.count(domain.name) > 1:
            raise UserError(
                f"domain {domain.name!r} occurs twice",
                where="data.domains",
                remedy="name each domain once; stream.mixing sets how often small domains are seen",
            )
        if domain.manifest.interactions <= 3 * domain.manifest.users:
            raise UserError(
                "the domain has nothing to learn from: no user has more than three interactions, "
                "of which the last two are held out for validation and test",
                where=domain.folder,
                remedy="leave out the domain, or prepare it from more interactions",
            )


def _describe_differences(
    saved: dict[str, Any], here: dict[str, Any], ancestors: dict[str, list[str]]
) -> Iterator[str]:
    """Describe how two orders differ.

    Args:
        ancestors: fingerprints of each domain before its appends, by name.
    """
    then, now = dict(saved.get("domains", [])), dict(here["domains"])
    for name in sorted(then.keys() | now.keys()):
        if name not in now:
            yield f"domain {name!r} is missing"
        elif name not in then:
            yield f"domain {name!r} is new"
        elif then[name] != now[name]:
            change = "was appended to" if then[name] in ancestors[name] else "was prepared anew"
            yield f"domain {name!r} {change} (manifest {then[name][:12]} then, {now[name][:12]} now)"
    if list(then) != list(now) and then.keys() == now.keys():
        yield f"the domains are in another order ({', '.join(then)} then, {', '.join(now)} now)"
    other = sorted((saved.keys() | here.keys()) - {"domains", "quotas"})
    changed = [key for key in other if saved.get(key) != here.get(key)]
    for key in changed:
        yield f"{key} was {saved.get(key)!r}, is {here.get(key)!r}"
    if not changed and then == now and saved.get("quotas") != here["quotas"]:
        yield f"the domains' quotas were {saved.get('quotas')!r}, are {here['quotas']!r}"
