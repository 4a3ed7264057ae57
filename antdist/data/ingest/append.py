"""Append later days, new users and new items to a prepared domain, beside the old shards.

    DATA/NAME/
      manifest.json             the current domain; replaced last, atomically
      items-*.tar sequences-*.tar popularity.npy   as first prepared; no append changes them
      append-00001/             new items; the whole histories of new users and of users with new interactions;
                                superseded.npy, positions of the histories that are replaced; popularity.npy, pending.tar;
                                manifest-FINGERPRINT.json, the manifest before

Memory: what is appended, and the histories of the users whom it touches; of the old shards one block at a time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antdist import faults, ragged
from antdist.batch import IntArray
from antdist.data.domain import Domain, Sequences, open_domain
from antdist.data.ingest.histories import order_interactions, truncate_sequences
from antdist.data.ingest.items import ModalityCounts, make_item_records
from antdist.data.ingest.prepare import check_sizes
from antdist.data.ingest.readers.base import Item, SourceData, Tally, format_tally
from antdist.data.ingest.sources import Format, SourceFiles, map_known_items, read_source
from antdist.data.manifest import (
    MANIFEST_NAME,
    Block,
    Generation,
    ItemShard,
    Manifest,
    SequenceShard,
    SupersededCounts,
    archived_manifest_name,
    write_manifest,
)
from antdist.data.quarantine import MAX_BAD, Quarantine, write_quarantine
from antdist.data.shards import MIN_INTERACTIONS, UserBlock, drop_users
from antdist.data.writing import (
    BLOCK_USERS,
    ITEMS_PER_SHARD,
    Histories,
    check_name,
    split_into_blocks,
    training_popularity,
    write_array,
    write_items,
    write_pending,
    write_sequences,
)
from antdist.errors import UserError
from antdist.io.files import flush_to_disk, write_folder_atomically
from antdist.io.locks import try_lock
from antdist.io.progress import track
from antdist.report import Report, count

NOT_COMPARABLE = (
    "evaluation results before and after this append do not compare: an updated user's last interaction is the new test "
    "item, and the former test item is now trained on"
)


@dataclass(frozen=True, repr=False)
class AppendReport(Report):
    """What was added, and what was left out (`notes`: kind and count; `examples`: a few of each)."""

    domain: str
    folder: str
    new_users: int
    updated_users: int  # users of the domain with new interactions
    new_items: int
    new_interactions: int
    pending_users: int  # users with fewer than three interactions, in all
    users: int
    items: int
    interactions: int
    k_core: int | None  # of the domain's preparation
    fingerprint: str
    previous_fingerprint: str  # equal to `fingerprint` if there was nothing new
    notes: dict[str, int]
    examples: dict[str, list[str]]
    quarantined: int
    seconds: float

    def lines(self) -> list[str]:
        """Format the report for the terminal."""
        lines = [
            f"{self.domain}: {count(self.new_users, 'new user')}, {count(self.updated_users, 'user')} with more interactions, "
            f"{count(self.new_items, 'new item')}, {count(self.new_interactions, 'more interaction')}",
            f"in all {count(self.users, 'user')}, {count(self.items, 'item')}, {count(self.interactions, 'interaction')}; "
            f"{count(self.pending_users, 'pending user')} with fewer than three interactions",
            *format_tally(self.notes, self.examples),
        ]
        if self.quarantined:
            lines.append(f"bad records quarantined: {self.quarantined:,}")
        before = self.previous_fingerprint[:16]
        if self.fingerprint == self.previous_fingerprint:
            return [*lines, f"nothing new: {self.folder} is unchanged, {before}"]
        if self.k_core is not None:
            lines.append(f"the domain was prepared with a {self.k_core}-core, which is not applied to appended records")
        if self.updated_users:
            lines.append(NOT_COMPARABLE)
        if self.new_items:
            lines.append("new items have no features yet: run `antdist featurize` again; only they are encoded")
        return [*lines, f"appended to {self.folder} ({self.seconds:.1f} s), {before} -> {self.fingerprint[:16]}"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Packing:
    """How appended users and items are packed; see `write_domain`."""

    block_users: int
    items_per_shard: int
    blocks_per_shard: int | None


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
    """Add the interactions and items of source files to the prepared domain `out/domain`, atomically.

    A user's old and new interactions are sorted by time together (of equal times the old come first), and truncated if the
    domain was. Interactions that the domain already has, with the same user, item and time, are dropped, so that appending
    the same files again changes nothing. Existing items stay unchanged. No k-core is applied; users with fewer than three
    interactions are kept in `pending.tar` for a later append.

    Args: as in `prepare_domain`; a tabular source may lack an items file.

    Raises:
        UserError: the domain is missing, damaged or of another format, the input is faulty, or another append is running.
    """
    start = time.monotonic()
    folder = Path(out) / domain
    check_name(domain)
    check_sizes(block_users=block_users, items_per_shard=items_per_shard, blocks_per_shard=blocks_per_shard)
    if not (folder / MANIFEST_NAME).is_file():
        raise UserError("no prepared domain to append to", where=folder, remedy="prepare it first, without --append")
    with _lock_domain(folder):
        old = open_domain(folder)
        _check_format(old, format)
        quarantine = Quarantine(max_bad)
        files = SourceFiles(source, format, interactions, items, images, columns)
        touched_only = _read_filter(old, "k_core") is not None
        data = read_source(files, touched_only=touched_only, quarantine=quarantine, items_required=False)
        index_of, new_items = _match_items(old, data)
        known = map_known_items(data, index_of, drop_unknown, quarantine, "the domain or the items file")
        del index_of
        update = _merge_histories(old, data, *known)
        manifest = old.manifest
        if new_items or update.has_changes:
            packing = _Packing(block_users, items_per_shard, blocks_per_shard)
            manifest = _write_append(old, update, new_items, data.tally, quarantine, packing)
    return _make_report(old, manifest, update, data.tally, quarantine, time.monotonic() - start)


@contextlib.contextmanager
def _lock_domain(folder: Path) -> Iterator[None]:
    """Lock the domain against other appends, without waiting."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise UserError("another append is running", where=folder, remedy="wait until it ends")
        yield
    finally:
        os.close(descriptor)


def _check_format(old: Domain, format: str) -> None:
    prepared_from = old.manifest.made.get("format")
    if "atomic" in (format, prepared_from):
        what = "the atomic format keeps its published split, so nothing can be appended"
        raise UserError(what, where=old.folder, remedy="prepare the domain from its raw interactions")
    if prepared_from != format:
        raise UserError(
            f"the domain was prepared from format {prepared_from}, not {format}: ids and times may differ in meaning",
            where=old.folder,
            remedy=f"use --format {prepared_from}, or prepare another domain",
        )


def _read_filter(old: Domain, key: str) -> int | None:
    """Return `k_core` or `max_sequence` of the domain's preparation."""
    value = old.manifest.made.get(key)
    if not isinstance(value, int | None):
        what, where = f"key made.{key}: {value!r} is not an integer", old.folder / MANIFEST_NAME
        raise UserError(what, where=where, remedy="prepare the domain again")
    return value


def _make_report(
    old: Domain, manifest: Manifest, update: _Update, tally: Tally, quarantine: Quarantine, seconds: float
) -> AppendReport:
    pending = open_domain(old.folder).pending  # type: ignore[arg-type]
    return AppendReport(
        domain=old.name,
        folder=str(old.folder),
        new_users=manifest.users - old.manifest.users,
        updated_users=len(update.superseded),
        new_items=manifest.items - old.manifest.items,
        new_interactions=manifest.interactions - old.manifest.interactions,
        pending_users=pending.users if pending else 0,
        users=manifest.users,
        items=manifest.items,
        interactions=manifest.interactions,
        k_core=_read_filter(old, "k_core"),
        fingerprint=manifest.fingerprint,
        previous_fingerprint=old.fingerprint,
        notes=tally.counts,
        examples=tally.examples,
        quarantined=len(quarantine.records),
        seconds=seconds,
    )


def _match_items(old: Domain, data: SourceData) -> tuple[dict[str, int], list[Item]]:
    """Return the index of each known item that interactions name, and the new items in their order.

    Where the domain was filtered by a k-core, which left out untouched items, untouched new items are left out as well.
    """
    touched = set(data.interactions.item_ids.to_pylist())
    fresh = {item.item_id: item for item in data.items}
    index_of: dict[str, int] = {}
    for index, metadata in enumerate(track(old.item_metadata(), "reading the catalogue", old.manifest.items)):
        if metadata.item_id in touched:
            index_of[metadata.item_id] = index
        given = fresh.pop(metadata.item_id, None)
        if given is not None and (given.text, given.price) != (metadata.text, metadata.price):
            example = f"item {metadata.item_id}"
            data.tally.add("items given with another text or price: kept as they were", example=example)
    new = [item for item in fresh.values() if _read_filter(old, "k_core") is None or item.item_id in touched]
    return index_of | {item.item_id: old.manifest.items + n for n, item in enumerate(new)}, new


# ---------------------------------------------------------------------------------------------------------- histories


@dataclass(frozen=True)
class _KnownUsers:
    """Users of the domain whom the source names, in the order of their codes.

    `positions` are among all stored users, -1 for pending users; `sequences` are their histories so far.
    """

    codes: IntArray
    positions: IntArray
    sequences: Sequences


@dataclass(frozen=True)
class _Update:
    """The new histories of the users whom the source names.

    `live` and `pending` are the users with new interactions; `superseded` the positions of the histories that are
    replaced, ascending, and `before` those histories; `no_longer_pending` the ids of pending users with new interactions.
    """

    live: Histories
    pending: Histories
    superseded: IntArray
    before: Sequences
    no_longer_pending: frozenset[str]

    @property
    def has_changes(self) -> bool:
        return bool(self.live[1] or self.pending[1])


def _merge_histories(
    old: Domain, data: SourceData, users: NDArray[Any], items: NDArray[Any], times: NDArray[Any]
) -> _Update:
    """Merge the users' old and new interactions (T,) in time order."""
    by_time = np.argsort(times, kind="stable")  # before fractions of a second are cut off, as in preparation
    users, items, times = users[by_time], items[by_time].astype(np.int64), times[by_time].astype(np.int64)
    user_ids = data.interactions.user_ids
    known, last = _find_users(old, {user: code for code, user in enumerate(user_ids.to_pylist())})
    known_codes = np.repeat(known.codes, known.sequences.lengths)

    stored = (known_codes, known.sequences.items, known.sequences.times)
    is_new = ~_find_duplicates(stored, (users.astype(np.int64), items, times))
    data.tally.add("interactions dropped: in the domain already", int((~is_new).sum()))
    users, items, times = users[is_new], items[is_new], times[is_new]
    if last is not None:
        data.tally.add("interactions earlier than the domain's last", int((times < last).sum()))
    pairs = zip(stored, (users, items, times), strict=True)
    merged, codes = order_interactions(*(np.concatenate(pair) for pair in pairs))
    longest = _read_filter(old, "max_sequence")
    if longest is not None:
        merged = truncate_sequences(merged, longest, data.tally)

    changed = _find_changed(known, merged, codes)
    live, pending = changed & (merged.lengths >= MIN_INTERACTIONS), changed & (merged.lengths < MIN_INTERACTIONS)
    is_updated = np.isin(known.codes, codes[changed])
    is_superseded = is_updated & (known.positions >= 0)
    by_position = np.flatnonzero(is_superseded)[np.argsort(known.positions[is_superseded])]
    return _Update(
        live=(merged.take(np.flatnonzero(live)), user_ids.take(codes[live]).to_pylist()),
        pending=(merged.take(np.flatnonzero(pending)), user_ids.take(codes[pending]).to_pylist()),
        superseded=known.positions[by_position],
        before=known.sequences.take(by_position),
        no_longer_pending=frozenset(user_ids.take(known.codes[is_updated & (known.positions < 0)]).to_pylist()),
    )


def _find_users(old: Domain, code_of: Mapping[str, int]) -> tuple[_KnownUsers, int | None]:
    """Find users of the domain whose ids have codes, and its last time; reads every sequence shard.

    Raises:
        UserError: a shard is damaged, or a user occurs twice in the domain.
    """
    parts = []
    last: int | None = None
    stored = (block for shard in range(len(old.manifest.sequence_shards)) for block in old.blocks_with_ids(shard))
    for positions, ids, block in track(stored, "reading users", old.manifest.blocks):
        parts.append(_select_users(positions, ids, block, code_of))
        if len(block.times):
            last = max(int(block.times.max()), int(block.times[0]) if last is None else last)
    for ids, block in old.pending_histories():
        parts.append(_select_users(np.full(len(ids), -1), ids, block, code_of))
    empty = np.zeros(0, np.int64)
    codes = np.concatenate([empty, *(part.codes for part in parts)])
    if len(np.unique(codes)) < len(codes):
        remedy = "list such users with `antdist verify`, and prepare the domain again"
        raise UserError("a user occurs twice in the domain", where=old.folder, remedy=remedy)
    by_code = np.argsort(codes)
    positions = np.concatenate([empty, *(part.positions for part in parts)])
    sequences = Sequences.concatenate([part.sequences for part in parts])
    return _KnownUsers(codes[by_code], positions[by_code], sequences.take(by_code)), last


def _select_users(positions: IntArray, ids: list[str], block: UserBlock, code_of: Mapping[str, int]) -> _KnownUsers:
    """Select the users of a block that have codes."""
    rows = np.array([row for row, user in enumerate(ids) if user in code_of], np.int64)
    codes = np.array([code_of[ids[row]] for row in rows.tolist()], np.int64)
    return _KnownUsers(codes, positions[rows], Sequences(block.offsets, block.items, block.times).take(rows))  # type: ignore[arg-type]


def _find_duplicates(old: tuple[IntArray, ...], new: tuple[IntArray, ...]) -> NDArray[np.bool_]:
    """Return which new rows (user, item, time) occur among the old, (T,) bool.

    Old and new rows are sorted together; equal rows form a run, and a run with an old row marks its new rows.
    """
    if not len(new[0]):
        return np.zeros(0, bool)
    columns = [np.concatenate(pair) for pair in zip(old, new, strict=True)]
    order = np.lexsort(columns)
    starts_run = np.zeros(len(order), bool)
    starts_run[0] = True
    for column in columns:
        starts_run[1:] |= column[order][1:] != column[order][:-1]
    run, old_rows = np.cumsum(starts_run) - 1, len(old[0])
    has_old = np.bincount(run, order < old_rows) > 0
    is_duplicate = np.empty(len(order), bool)
    is_duplicate[order] = has_old[run]
    return is_duplicate[old_rows:]


def _find_changed(known: _KnownUsers, merged: Sequences, codes: IntArray) -> NDArray[np.bool_]:
    """Return which users of `merged` are new or have another history than the domain holds, (U,) bool."""
    changed = np.ones(len(codes), bool)
    at = np.searchsorted(codes, known.codes)
    longer = known.sequences.lengths != merged.lengths[at]
    changed[at] = longer
    rows = np.flatnonzero(~longer)
    if len(rows):  # of equal length, but new interactions may have displaced old ones that were cut off
        before, after = known.sequences.take(rows), merged.take(at[rows])
        differs = (before.items != after.items) | (before.times != after.times)
        changed[at[rows]] = np.add.reduceat(differs.astype(np.int64), before.offsets[:-1]) > 0
    return changed


# ------------------------------------------------------------------------------------------------------------ writing


def _write_append(
    old: Domain, update: _Update, new_items: list[Item], tally: Tally, quarantine: Quarantine, packing: _Packing
) -> Manifest:
    """Write the append's folder, then replace the manifest.

    A process that dies before the last step leaves the domain unchanged.

    Every file and the folder are flushed to disk before the folder is renamed, and the folder is in place before the
    manifest names it, so no manifest can refer to files that a power cut has lost.
    """
    folder, name = old.writable_folder(), f"append-{len(old.manifest.earlier) + 1:05d}"
    with write_folder_atomically(folder / name, folder / f".{name}.partial") as partial:
        faults.inject("append", file="items")
        records = make_item_records(new_items, ModalityCounts(), tally, quarantine, old.manifest.items)
        item_shards = write_items(
            partial, records, packing.items_per_shard, first=old.manifest.items, prefix=f"{name}/"
        )
        manifest = _write_histories(old, update, partial, f"{name}/", packing, item_shards, tally)
        if quarantine.records:
            write_quarantine(partial, quarantine.records)
        shutil.copyfile(folder / MANIFEST_NAME, partial / archived_manifest_name(old.fingerprint))
        for path in [*partial.iterdir(), partial]:
            flush_to_disk(path)
        faults.inject("append", file="rename")
        shutil.rmtree(folder / name, ignore_errors=True)  # left by an append that died before its manifest
    faults.inject("append", file="manifest")
    write_manifest(folder, manifest)
    return manifest


def _write_histories(
    old: Domain,
    update: _Update,
    folder: Path,
    prefix: str,
    packing: _Packing,
    item_shards: list[ItemShard],
    tally: Tally,
) -> Manifest:
    """Write the updated histories, pending users and popularity of an append; return the new manifest."""
    before = old.manifest
    faults.inject("append", file="sequences")
    old_shards = _mark_superseded(old, update)
    users = sum(shard.users for shard in old_shards)
    sequence_shards = write_sequences(
        folder, *update.live, packing.block_users, packing.blocks_per_shard, first_user=users, prefix=prefix
    )
    faults.inject("append", file="pending")
    pending = _write_pending_users(old, update, folder, prefix, packing.block_users)
    faults.inject("append", file="superseded")
    items = before.items + sum(shard.items for shard in item_shards)
    popularity = write_array(folder / "popularity.npy", _update_popularity(old, update, items), prefix)
    superseded = before.superseded
    if len(update.superseded):
        positions = np.union1d(old.superseded, update.superseded)
        superseded = write_array(folder / "superseded.npy", positions, prefix)
    generation = Generation(
        fingerprint=old.fingerprint,
        users=before.users,
        items=before.items,
        interactions=before.interactions,
        notes=tally.counts,
    )
    return Manifest(
        domain=before.domain,
        users=users + len(update.live[1]),
        items=items,
        interactions=sum(shard.interactions for shard in [*old_shards, *sequence_shards]),
        item_shards=[*before.item_shards, *item_shards],
        sequence_shards=[*old_shards, *sequence_shards],
        popularity=popularity,
        made=before.made,
        superseded=superseded,
        pending=pending,
        earlier=[*before.earlier, generation],
    )


def _mark_superseded(old: Domain, update: _Update) -> list[SequenceShard]:
    """Return the domain's sequence shards with updated users counted as superseded."""
    blocks = [block for shard in old.manifest.sequence_shards for block in shard.blocks]
    starts = ragged.offsets(np.array([block.stored_users for block in blocks], np.int64))
    block_of = np.searchsorted(starts, update.superseded, side="right") - 1
    users, interactions = np.zeros((2, len(blocks)), np.int64)
    np.add.at(users, block_of, 1)
    np.add.at(interactions, block_of, update.before.lengths)
    counts = zip(users.tolist(), interactions.tolist(), strict=True)
    shards, first = [], 0
    for shard in old.manifest.sequence_shards:
        marked = [_mark_block(block, *next(counts)) for block in shard.blocks]
        totals = {name: sum(getattr(block, name) for block in marked) for name in ("users", "interactions")}
        shards.append(shard.model_copy(update={"blocks": marked, "first_user": first, **totals}))
        first += totals["users"]
    return shards


def _mark_block(block: Block, users: int, interactions: int) -> Block:
    if not users:
        return block
    before = block.superseded or SupersededCounts(users=0, interactions=0)
    return Block(
        key=block.key,
        users=block.users - users,
        interactions=block.interactions - interactions,
        superseded=SupersededCounts(users=before.users + users, interactions=before.interactions + interactions),
    )


def _update_popularity(old: Domain, update: _Update, items: int) -> IntArray:
    """Count how often each item occurs in the training parts of the appended domain, (items,)."""
    counts = np.zeros(items, np.int64)
    counts[: old.manifest.items] = old.popularity()
    return counts + training_popularity(update.live[0], items) - training_popularity(update.before, items)


def _write_pending_users(
    old: Domain, update: _Update, folder: Path, prefix: str, block_users: int
) -> SequenceShard | None:
    """Write the pending users anew, unless none of them changed."""
    if not update.no_longer_pending and not update.pending[1]:
        return old.pending
    pending = write_pending(folder, _pending_blocks(old, update, block_users), prefix)
    if not pending.users:
        (folder / pending.name.removeprefix(prefix)).unlink()
        return None
    return pending


def _pending_blocks(old: Domain, update: _Update, block_users: int) -> Iterator[tuple[list[str], UserBlock]]:
    for ids, block in old.pending_histories():
        dropped = [row for row, user in enumerate(ids) if user in update.no_longer_pending]
        if len(dropped) < len(ids):
            kept = [user for user in ids if user not in update.no_longer_pending]
            yield kept, drop_users(block, np.array(dropped, np.int64))
    yield from split_into_blocks(*update.pending, block_users)
