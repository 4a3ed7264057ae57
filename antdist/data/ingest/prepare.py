"""Prepare a domain from source files, and count all that is left out (docs/spec/ant.md, section 1).

Order of steps: unknown items, k-core, time order, users with too few interactions, most recent N; then items and shards
are written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from antdist.data.ingest.histories import (
    drop_untouched_items,
    order_interactions,
    select_interactions,
    truncate_sequences,
)
from antdist.data.ingest.items import ModalityCounts, make_item_records
from antdist.data.ingest.readers.base import Item, SourceData, Tally, format_tally
from antdist.data.ingest.sources import FORMATS, Format, SourceFiles, map_known_items, read_source
from antdist.data.manifest import Manifest
from antdist.data.quarantine import MAX_BAD, QUARANTINE_NAME, Quarantine, write_quarantine
from antdist.data.shards import MIN_INTERACTIONS
from antdist.data.writing import BLOCK_USERS, ITEMS_PER_SHARD, Histories, check_name, check_target_folder, write_domain
from antdist.errors import UserError
from antdist.report import Report, count


@dataclass(frozen=True, repr=False)
class PrepareReport(Report):
    """What was written, and what was left out (`notes`: kind and count; `examples`: a few of each)."""

    domain: str
    folder: str
    users: int
    items: int
    interactions: int
    with_text: int
    with_price: int
    with_image: int
    blocks: int
    fingerprint: str
    notes: dict[str, int]
    examples: dict[str, list[str]]
    quarantined: int  # bad records, listed in the domain's quarantine.jsonl
    seconds: float

    def lines(self) -> list[str]:
        """Format the report for the terminal."""
        lines = [
            f"{self.domain}: {count(self.users, 'user')}, {count(self.items, 'item')}, {count(self.interactions, 'interaction')}",
            f"items with text {self.with_text:,}, with price {self.with_price:,}, with images {self.with_image:,}",
            *format_tally(self.notes, self.examples),
        ]
        if self.quarantined:
            file = Path(self.folder) / QUARANTINE_NAME
            lines.append(f"bad records quarantined: {self.quarantined:,}, listed with file, line and reason in {file}")
        return [
            *lines,
            f"wrote {self.folder} ({count(self.blocks, 'block')}, {self.seconds:.1f} s), {self.fingerprint[:16]}",
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Filters:
    """Which interactions and items of a source are kept.

    Args:
        k_core: keep only users and items with at least this many interactions, iteratively (users: never fewer than
            three). None: off; then every item of the items file is kept, whether or not a user has it.
        max_sequence: keep only this many most recent interactions of every user. None: all.
        drop_unknown: drop interactions with items that the items file lacks, instead of refusing them.
    """

    k_core: int | None
    max_sequence: int | None
    drop_unknown: bool


@dataclass(frozen=True)
class _Filtered:
    """The histories and items that are kept; `pending` are users with too few interactions."""

    histories: Histories
    pending: Histories | None
    items: list[Item]


def prepare_domain(
    source: str | Path | None = None,
    *,
    format: Format = "tabular",
    domain: str,
    out: str | Path,
    interactions: str | Path | None = None,
    items: str | Path | None = None,
    images: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    k_core: int | None = None,
    max_sequence: int | None = None,
    drop_unknown: bool = False,
    max_bad: float = MAX_BAD,
    overwrite: bool = False,
    block_users: int = BLOCK_USERS,
    items_per_shard: int = ITEMS_PER_SHARD,
    blocks_per_shard: int | None = None,
) -> PrepareReport:
    """Read, filter, order, split and pack a domain into `out/domain/`, atomically.

    Args:
        source, format, interactions, items, images, columns: see `SourceFiles`.
        k_core, max_sequence, drop_unknown: see `Filters`.
        max_bad: share of a file's records that may be quarantined (`antdist.data.quarantine`): lines of interactions and
            items, interactions with unknown items, broken images. The atomic format allows none.
        overwrite: replace a prepared domain.
        block_users, items_per_shard, blocks_per_shard: see `write_domain`.

    Raises:
        UserError: the input is faulty, nothing is left of it, or the domain exists.
    """
    start = time.monotonic()
    folder, filters = Path(out) / domain, Filters(k_core, max_sequence, drop_unknown)
    check_name(domain)
    check_target_folder(folder, overwrite)
    _check_filters(format, filters)
    check_sizes(block_users=block_users, items_per_shard=items_per_shard, blocks_per_shard=blocks_per_shard)
    quarantine, counts = Quarantine(max_bad), ModalityCounts()
    files = SourceFiles(source, format, interactions, items, images, columns)
    data = read_source(files, touched_only=k_core is not None, quarantine=quarantine)
    kept = _apply_filters(data, filters, quarantine, domain)
    manifest = write_domain(
        folder,
        domain,
        make_item_records(kept.items, counts, data.tally, quarantine),
        *kept.histories,
        # The notes grow while images are read; the manifest is written last and has them all.
        {"format": format, "k_core": k_core, "max_sequence": max_sequence, "notes": data.tally.counts},
        pending=kept.pending,
        block_users=block_users,
        items_per_shard=items_per_shard,
        blocks_per_shard=blocks_per_shard,
        overwrite=overwrite,
    )
    if quarantine.records:
        write_quarantine(folder, quarantine.records)
    return _make_report(manifest, folder, counts, data.tally, quarantine, time.monotonic() - start)


def check_sizes(**sizes: int | None) -> None:
    """Refuse block and shard sizes, given by name, that are neither None nor positive."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"must be positive, not {size}", where=name, remedy="use 1 or more")


def _check_filters(format: Format, filters: Filters) -> None:
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", where="--format", remedy=f"use one of {', '.join(FORMATS)}")
    if format == "atomic" and filters != Filters(None, None, False):
        what = "the atomic format keeps its published split, so nothing can be filtered or truncated"
        raise UserError(what, where="--format", remedy="leave out --k-core, --max-sequence and --drop-unknown")
    if filters.k_core is not None and filters.k_core < 1:
        raise UserError(
            f"is {filters.k_core}, must be at least 1", where="--k-core", remedy="leave it out for no filter"
        )
    if filters.max_sequence is not None and filters.max_sequence < MIN_INTERACTIONS:
        what, remedy = f"is {filters.max_sequence}, must be at least {MIN_INTERACTIONS}", "leave it out to keep all"
        raise UserError(what, where="--max-sequence", remedy=remedy)


def _apply_filters(data: SourceData, filters: Filters, quarantine: Quarantine, domain: str) -> _Filtered:
    """Select, order and truncate the histories of a source. Raises UserError if none is left."""
    index_of = {item.item_id: index for index, item in enumerate(data.items)}
    users, items, times = map_known_items(data, index_of, filters.drop_unknown, quarantine)
    del index_of
    tally, k_core = data.tally, filters.k_core
    kept = select_interactions(users, items, k_core, tally)
    if not len(kept):
        what = f"the {k_core}-core is empty: no user and item with at least {k_core} interactions are left"
        if k_core is None:
            what = "no user has three interactions or more, so nothing is left"
        raise UserError(what, where=domain, remedy="use a smaller k-core or none, or give more interactions")
    sequences, codes = order_interactions(users[kept], items[kept], times[kept])
    catalogue, pending = data.items, None
    if k_core is None:
        is_short = np.ones(len(users), bool)
        is_short[kept] = False
        if is_short.any():
            short, short_codes = order_interactions(users[is_short], items[is_short], times[is_short])
            pending = short, data.interactions.user_ids.take(short_codes).to_pylist()
    else:
        sequences, catalogue = drop_untouched_items(sequences, data.items, k_core, tally)
    if filters.max_sequence is not None:
        sequences = truncate_sequences(sequences, filters.max_sequence, tally)
    return _Filtered((sequences, data.interactions.user_ids.take(codes).to_pylist()), pending, catalogue)


def _make_report(
    manifest: Manifest, folder: Path, counts: ModalityCounts, tally: Tally, quarantine: Quarantine, seconds: float
) -> PrepareReport:
    return PrepareReport(
        domain=manifest.domain,
        folder=str(folder),
        users=manifest.users,
        items=manifest.items,
        interactions=manifest.interactions,
        with_text=counts.text,
        with_price=counts.price,
        with_image=counts.image,
        blocks=manifest.blocks,
        fingerprint=manifest.fingerprint,
        notes=tally.counts,
        examples=tally.examples,
        quarantined=len(quarantine.records),
        seconds=seconds,
    )
