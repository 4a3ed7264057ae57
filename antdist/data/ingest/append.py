"""Appending to a prepared domain: later days, new users and new items, in a folder of their own beside the old shards.

    DATA/NAME/
      manifest.json             the domain as it is; replaced last, in one step
      items-*.tar sequences-*.tar popularity.npy   as first prepared; no append touches them
      append-00001/             new items; new users, and those with new interactions, whose whole history stands here;
                                superseded.npy, whose earlier copies count no more; popularity.npy, pending.tar;
                                manifest-FINGERPRINT.json, what the domain was before

Memory: what is appended, and the histories of the users whom it touches; of the old shards a block at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antdist import faults, ragged
from antdist.batch import IntArray
from antdist.data.domain import (
    BLOCK_USERS,
    ITEMS_PER_SHARD,
    MIN_INTERACTIONS,
    Domain,
    Sequences,
    UserBlock,
    check_name,
    open_domain,
    split_into_blocks,
    training_popularity,
    write_array,
    write_items,
    write_pending,
    write_sequences,
)
from antdist.data.ingest.prepare import (
    Format,
    check_sizes,
    make_item_records,
    map_known_items,
    order_interactions,
    read_source,
    truncate_sequences,
)
from antdist.data.ingest.readers.base import Item, Source, Tally, format_tally
from antdist.data.manifest import (
    MANIFEST_NAME,
    Block,
    Generation,
    Manifest,
    SequenceShard,
    Superseded,
    archived_manifest_name,
    write_manifest,
)
from antdist.data.quarantine import MAX_BAD, Quarantine, write_quarantine
from antdist.data.shards import without
from antdist.errors import UserError
from antdist.io.files import flush_to_disk
from antdist.io.progress import track

NOT_COMPARABLE = (
    "a grown user's last interaction tests from here on, and what tested before trains: figures of models evaluated before "
    "and after do not compare"
)


@dataclass(frozen=True)
class AppendReport:
    """What was added, and what was left out or is worth knowing (`notes`: kind and count; `examples`: a few of each)."""

    domain: str
    folder: str
    new_users: int
    grown_users: int  # users of the domain with new interactions
    new_items: int
    new_interactions: int
    waiting: int  # users with fewer than three interactions, all together
    users: int
    items: int
    interactions: int
    k_core: int | None  # that the domain was prepared with
    fingerprint: str
    was: str  # the fingerprint before; the same where there was nothing new
    notes: dict[str, int]
    examples: dict[str, list[str]]
    quarantined: int
    seconds: float

    def lines(self) -> list[str]:
        """For the terminal."""
        told = [
            f"{self.domain}: {self.new_users:,} new users, {self.grown_users:,} users with more interactions, "
            f"{self.new_items:,} new items, {self.new_interactions:,} more interactions",
            f"in all {self.users:,} users, {self.items:,} items, {self.interactions:,} interactions; {self.waiting:,} users "
            f"wait for their third interaction",
        ]
        told += format_tally(self.notes, self.examples)
        if self.quarantined:
            told.append(f"bad records set aside: {self.quarantined:,}")
        if self.fingerprint == self.was:
            return [*told, f"nothing new: {self.folder} stays as it is, {self.was[:16]}"]
        if self.k_core is not None:
            told.append(f"the domain was prepared with a {self.k_core}-core: what is appended is not filtered by it")
        if self.grown_users:
            told.append(NOT_COMPARABLE)
        if self.new_items:
            told.append("new items have no features yet: featurize again, and only they are encoded")
        return [*told, f"grew {self.folder} ({self.seconds:.1f} s), {self.was[:16]} -> {self.fingerprint[:16]}"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def append_to_domain(
    source: str | Path | None = None,
    *,
    format: Format = "tabular",
    domain: str,
    out: str | Path,
    interactions: str | Path | None = None,
    items: str | Path | None = None,
    images: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    drop_unknown: bool = False,
    max_bad: float = MAX_BAD,
    block_users: int = BLOCK_USERS,
    items_per_shard: int = ITEMS_PER_SHARD,
    blocks_per_shard: int | None = None,
) -> AppendReport:
    """Add the interactions and items of source files to the prepared domain `out/domain`; whole or not at all.

    A user's old and new interactions are ordered by time anew (of equal times the old come first) and cut to the most recent
    ones if the domain was. Interactions that are there already, with the same user, item and time, are dropped, so that
    appending the same files again changes nothing. Items that are there already stay as they are. No k-core is applied;
    users with fewer than three interactions wait in `pending.tar` for a later append.

    Args: as `prepare`; a tabular source need not have an items file.

    Raises:
        UserError: no such domain, or one of another form; a damaged shard of it; faulty input; another append is at work.
    """
    start = time.monotonic()
    folder = Path(out) / domain
    check_name(domain)
    check_sizes(block_users, items_per_shard, blocks_per_shard)
    if not (folder / MANIFEST_NAME).is_file():
        raise UserError("no prepared domain to append to", where=folder, remedy="prepare it first, without --append")
    with _alone(folder):
        old = open_domain(folder)
        _check_form(old, format)
        quarantine = Quarantine(max_bad)
        data = read_source(
            source,
            format=format,
            interactions=interactions,
            items=items,
            images=images,
            columns=columns,
            touched_only=_filter(old, "k_core") is not None,
            quarantine=quarantine,
            without_items=True,
        )
        tally = data.tally
        at, new_items = _match_items(old, data, tally)
        users, places, times = map_known_items(data, at, drop_unknown, quarantine, "the domain or the items file")
        del at
        grown = _grow(old, data, users, places, times, tally)
        manifest = old.manifest
        if new_items or grown.changed:
            sizes = (block_users, items_per_shard, blocks_per_shard)
            manifest = _write(old, grown, new_items, tally, quarantine, *sizes)
    pending = open_domain(folder).pending
    return AppendReport(
        domain=domain,
        folder=str(folder),
        new_users=manifest.users - old.manifest.users,
        grown_users=len(grown.superseded),
        new_items=manifest.items - old.manifest.items,
        new_interactions=manifest.interactions - old.manifest.interactions,
        waiting=pending.users if pending else 0,
        users=manifest.users,
        items=manifest.items,
        interactions=manifest.interactions,
        k_core=_filter(old, "k_core"),
        fingerprint=manifest.fingerprint,
        was=old.fingerprint,
        notes=tally.counts,
        examples=tally.examples,
        quarantined=len(quarantine.records),
        seconds=time.monotonic() - start,
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within the block no other append works on the domain."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError("another append is at work here", where=folder, remedy="wait for it") from None
        yield
    finally:
        os.close(descriptor)


def _check_form(old: Domain, format: str) -> None:
    was = old.manifest.made.get("format")
    if "atomic" in (format, was):
        what = "the atomic form keeps its published split, so nothing can be appended"
        raise UserError(what, where=old.folder, remedy="prepare the domain from its raw interactions")
    if was != format:
        raise UserError(
            f"the domain was prepared from the form {was}, not {format}: times and ids may mean something else",
            where=old.folder,
            remedy=f"use --format {was}, or prepare another domain",
        )


def _filter(old: Domain, key: str) -> int | None:
    """`k_core` or `max_sequence` of the domain's preparation."""
    value = old.manifest.made.get(key)
    if not isinstance(value, int | None):
        raise UserError(
            f"key made.{key}: {value!r} is no number", where=old.folder / MANIFEST_NAME, remedy="prepare it again"
        )
    return value


# -------------------------------------------------------------------------------------------------------------- items


def _match_items(old: Domain, data: Source, tally: Tally) -> tuple[dict[str, int], list[Item]]:
    """The index of each item that interactions name, as far as it is known; and the items that are new, in their order.

    Where the domain was filtered by a k-core, untouched items were left out, so they are here, too."""
    touched = set(data.interactions.item_ids.to_pylist())
    fresh = {item.item_id: item for item in data.items}
    at: dict[str, int] = {}
    for index, facts in enumerate(track(old.item_metadata(), "reading the catalogue", old.manifest.items)):
        if facts.item_id in touched:
            at[facts.item_id] = index
        given = fresh.pop(facts.item_id, None)
        if given is not None and (given.text, given.price) != (facts.text, facts.price):
            tally.add("items given with another text or price: kept as they were", example=f"item {facts.item_id}")
    new = [item for item in fresh.values() if _filter(old, "k_core") is None or item.item_id in touched]
    return at | {item.item_id: old.manifest.items + n for n, item in enumerate(new)}, new


# ---------------------------------------------------------------------------------------------------------- histories


@dataclass(frozen=True)
class _Found:
    """Users of the domain whom the source names, in the order of their codes: `places` among all that the shards hold, -1 of
    those who wait; `sequences` are their histories."""

    codes: IntArray
    places: IntArray
    sequences: Sequences


@dataclass(frozen=True)
class _Grown:
    """What becomes of the users whom the source names.

    `live` and `waiting` are those with new interactions, with their ids; `superseded` the places of their histories so far,
    ascending, which are `before`; `taken` the ids of all who waited and have new interactions.
    """

    live: tuple[Sequences, list[str]]
    waiting: tuple[Sequences, list[str]]
    superseded: IntArray
    before: Sequences
    taken: frozenset[str]

    @property
    def changed(self) -> bool:
        return bool(self.live[1] or self.waiting[1])


def _grow(
    old: Domain, data: Source, users: NDArray[Any], items: NDArray[Any], times: NDArray[Any], tally: Tally
) -> _Grown:
    """The users' old and new interactions together, in order."""
    by_time = np.argsort(times, kind="stable")  # before fractions of a second are cut off, as in preparation
    users, items, times = users[by_time], items[by_time].astype(np.int64), times[by_time].astype(np.int64)
    user_ids = data.interactions.user_ids
    found, last = _find(old, {user: code for code, user in enumerate(user_ids.to_pylist())})
    known = np.repeat(found.codes, np.diff(found.sequences.offsets))

    fresh = ~_there((known, found.sequences.items, found.sequences.times), (users.astype(np.int64), items, times))
    tally.add("interactions dropped: in the domain already", int((~fresh).sum()))
    users, items, times = users[fresh], items[fresh], times[fresh]
    if last is not None:
        tally.add("interactions earlier than the domain's last", int((times < last).sum()))
    together, codes = order_interactions(
        np.concatenate([known, users]),
        np.concatenate([found.sequences.items, items]),
        np.concatenate([found.sequences.times, times]),
    )
    longest = _filter(old, "max_sequence")
    if longest is not None:
        together = truncate_sequences(together, longest, tally)
    changed = _changed(found, together, codes)
    lengths = np.diff(together.offsets)
    live, waiting = changed & (lengths >= MIN_INTERACTIONS), changed & (lengths < MIN_INTERACTIONS)

    grown = np.isin(found.codes, codes[changed])
    superseded = grown & (found.places >= 0)
    by_place = np.flatnonzero(superseded)[np.argsort(found.places[superseded])]
    taken = user_ids.take(found.codes[grown & (found.places < 0)]).to_pylist()
    return _Grown(
        live=(_take(together, np.flatnonzero(live)), user_ids.take(codes[live]).to_pylist()),
        waiting=(_take(together, np.flatnonzero(waiting)), user_ids.take(codes[waiting]).to_pylist()),
        superseded=found.places[by_place],
        before=_take(found.sequences, by_place),
        taken=frozenset(taken),
    )


def _find(old: Domain, codes: Mapping[str, int]) -> tuple[_Found, int | None]:
    """The users of the domain whose ids have codes, by code; and the domain's last time. Reads every sequence shard.

    Raises:
        UserError: a shard is damaged; a user stands in the domain twice.
    """
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), Sequences(*[np.zeros(n, np.int64) for n in (1, 0, 0)]))]
    last: int | None = None
    stored = (block for shard in range(len(old.manifest.sequence_shards)) for block in old.stored(shard))
    for places, ids, block in track(stored, "reading users", old.manifest.blocks):
        parts.append(_named(places, ids, block, codes))
        if len(block.times):
            last = max(int(block.times.max()), int(block.times[0]) if last is None else last)
    for ids, block in old.pending_histories():
        parts.append(_named(np.full(len(ids), -1), ids, block, codes))
    found, places = (np.concatenate([part[n] for part in parts]) for n in (0, 1))
    if len(np.unique(found)) < len(found):
        raise UserError("a user stands in the domain twice", where=old.folder, remedy="see `antdist verify`")
    by_code = np.argsort(found)
    return _Found(found[by_code], places[by_code], _take(_joined([part[2] for part in parts]), by_code)), last


def _named(
    places: IntArray, ids: list[str], block: UserBlock, codes: Mapping[str, int]
) -> tuple[IntArray, IntArray, Sequences]:
    """Codes, places and histories of a block's users that have codes."""
    rows = np.array([row for row, user in enumerate(ids) if user in codes], np.int64)
    found = np.array([codes[ids[row]] for row in rows.tolist()], np.int64)
    return found, places[rows], _take(Sequences(block.offsets, block.items.astype(np.int64), block.times), rows)


def _take(sequences: Sequences, rows: IntArray) -> Sequences:
    """Some users, in this order."""
    lengths = np.diff(sequences.offsets)[rows]
    at = ragged.ranges(sequences.offsets[:-1][rows], lengths)
    return Sequences(ragged.offsets(lengths), sequences.items[at], sequences.times[at])


def _joined(parts: Sequence[Sequences]) -> Sequences:
    """The users of all parts, one after the other."""
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    items, times = (np.concatenate([getattr(part, name) for part in parts]) for name in ("items", "times"))
    return Sequences(ragged.offsets(lengths), items, times)


def _there(old: tuple[IntArray, ...], new: tuple[IntArray, ...]) -> NDArray[np.bool_]:
    """Which of the new rows (user, item, time) are among the old."""
    if not len(new[0]):
        return np.zeros(0, bool)
    columns = [np.concatenate(pair) for pair in zip(old, new, strict=True)]
    in_order = np.lexsort(columns)
    first = np.zeros(len(in_order), bool)  # of a run of equal rows
    first[0] = True
    for column in columns:
        first[1:] |= column[in_order][1:] != column[in_order][:-1]
    run, count = np.cumsum(first) - 1, len(old[0])
    holds_old = np.bincount(run, in_order < count) > 0
    there = np.empty(len(in_order), bool)
    there[in_order] = holds_old[run]
    return there[count:]


def _changed(found: _Found, together: Sequences, codes: IntArray) -> NDArray[np.bool_]:
    """Which users of `together` have another history than the domain holds, or are new to it."""
    changed = np.ones(len(codes), bool)
    at = np.searchsorted(codes, found.codes)
    longer = np.diff(found.sequences.offsets) != np.diff(together.offsets)[at]
    changed[at] = longer
    rows = np.flatnonzero(~longer)
    if len(rows):  # as long as before: others may have come for those that were cut off
        before, after = _take(found.sequences, rows), _take(together, at[rows])
        differs = (before.items != after.items) | (before.times != after.times)
        changed[at[rows]] = np.add.reduceat(differs.astype(np.int64), before.offsets[:-1]) > 0
    return changed


# ------------------------------------------------------------------------------------------------------------ writing


def _write(
    old: Domain,
    grown: _Grown,
    new_items: list[Item],
    tally: Tally,
    quarantine: Quarantine,
    block_users: int,
    items_per_shard: int,
    blocks_per_shard: int | None,
) -> Manifest:
    """The folder of this append, with the old manifest under another name, then the new one in its place: a process that dies
    on the way leaves the domain as it was."""
    was, folder, name = old.manifest, old.writable_folder(), f"append-{len(old.manifest.earlier) + 1:05d}"
    partial, prefix = folder / f".{name}.partial", f"{name}/"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        faults.at("append", file="items")
        records = make_item_records(new_items, {"text": 0, "price": 0, "image": 0}, tally, quarantine, was.items)
        item_shards = write_items(partial, records, items_per_shard, first=was.items, prefix=prefix)
        faults.at("append", file="sequences")
        kept = _marked(old, grown)
        users = sum(shard.users for shard in kept)
        sequence_shards = write_sequences(
            partial, *grown.live, block_users, blocks_per_shard, first_user=users, prefix=prefix
        )
        faults.at("append", file="pending")
        pending = _write_pending(old, grown, partial, prefix, block_users)
        faults.at("append", file="superseded")
        items = was.items + len(new_items)
        popularity = write_array(partial / "popularity.npy", _popularity(old, grown, items), prefix)
        superseded = was.superseded
        if len(grown.superseded):
            places = np.union1d(old.superseded, grown.superseded)
            superseded = write_array(partial / "superseded.npy", places, prefix)
        manifest = Manifest(
            domain=was.domain,
            users=users + len(grown.live[1]),
            items=items,
            interactions=sum(shard.interactions for shard in [*kept, *sequence_shards]),
            item_shards=[*was.item_shards, *item_shards],
            sequence_shards=[*kept, *sequence_shards],
            popularity=popularity,
            made=was.made,
            superseded=superseded,
            pending=pending,
            earlier=[*was.earlier, _generation(old, tally)],
        )
        if quarantine.records:
            write_quarantine(partial, quarantine.records)
        shutil.copyfile(folder / MANIFEST_NAME, partial / archived_manifest_name(old.fingerprint))
        for path in [*partial.iterdir(), partial]:
            flush_to_disk(path)
        faults.at("append", file="rename")
        shutil.rmtree(folder / name, ignore_errors=True)  # left by an append that died before its manifest
        partial.rename(folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    faults.at("append", file="manifest")
    write_manifest(folder, manifest)
    return manifest


def _generation(old: Domain, tally: Tally) -> Generation:
    was = old.manifest
    return Generation(
        fingerprint=old.fingerprint, users=was.users, items=was.items, interactions=was.interactions, notes=tally.counts
    )


def _marked(old: Domain, grown: _Grown) -> list[SequenceShard]:
    """The domain's shards, those users counted as superseded who have grown."""
    blocks = [block for shard in old.manifest.sequence_shards for block in shard.blocks]
    starts = ragged.offsets([block.stored_users for block in blocks])
    block_of = np.searchsorted(starts, grown.superseded, side="right") - 1
    users, interactions = np.zeros((2, len(blocks)), np.int64)
    np.add.at(users, block_of, 1)
    np.add.at(interactions, block_of, np.diff(grown.before.offsets))
    less = zip(users.tolist(), interactions.tolist(), strict=True)
    shards, first = [], 0
    for shard in old.manifest.sequence_shards:
        marked = [_less(block, *next(less)) for block in shard.blocks]
        counts = {name: sum(getattr(block, name) for block in marked) for name in ("users", "interactions")}
        shards.append(shard.model_copy(update={"blocks": marked, "first_user": first, **counts}))
        first += counts["users"]
    return shards


def _less(block: Block, users: int, interactions: int) -> Block:
    if not users:
        return block
    before = block.superseded or Superseded(users=0, interactions=0)
    return Block(
        key=block.key,
        users=block.users - users,
        interactions=block.interactions - interactions,
        superseded=Superseded(users=before.users + users, interactions=before.interactions + interactions),
    )


def _popularity(old: Domain, grown: _Grown, items: int) -> NDArray[np.int64]:
    """How often each item occurs in the training parts of the grown domain."""
    counts = np.zeros(items, np.int64)
    counts[: old.manifest.items] = old.popularity()
    return counts + training_popularity(grown.live[0], items) - training_popularity(grown.before, items)


def _write_pending(old: Domain, grown: _Grown, folder: Path, prefix: str, block_users: int) -> SequenceShard | None:
    """Those who wait: as before where nothing changed, else written anew."""
    if not grown.taken and not grown.waiting[1]:
        return old.pending
    pending = write_pending(folder, _waiting(old, grown, block_users), prefix)
    if not pending.users:
        (folder / pending.name.removeprefix(prefix)).unlink()
        return None
    return pending


def _waiting(old: Domain, grown: _Grown, block_users: int) -> Iterator[tuple[list[str], UserBlock]]:
    for ids, block in old.pending_histories():
        gone = [row for row, user in enumerate(ids) if user in grown.taken]
        if len(gone) < len(ids):
            yield [user for user in ids if user not in grown.taken], without(block, np.array(gone, np.int64))
    yield from split_into_blocks(*grown.waiting, block_users)
