"""Preparation (spec, section 1): source data to a prepared domain, with a tally of all that was left out.

Order of steps: unknown items, k-core, time order, users too short, most recent N; then items and shards are written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from antdist import ragged
from antdist.data.domain import (
    BLOCK_USERS,
    ITEMS_PER_SHARD,
    MIN_INTERACTIONS,
    ItemRecord,
    Sequences,
    check_name,
    check_target_folder,
    write_domain,
)
from antdist.data.images import MISSING, BrokenImageError, load_image
from antdist.data.ingest.readers.base import Item, Source, Tally, format_tally
from antdist.data.manifest import Manifest
from antdist.data.quarantine import (
    EARLY_CHECK,
    MAX_BAD,
    QUARANTINE_NAME,
    BadRecord,
    Quarantine,
    max_bad_records,
    write_quarantine,
)
from antdist.errors import UserError
from antdist.io.progress import track

Format = Literal["tabular", "amazon", "atomic"]
FORMATS: tuple[Format, ...] = ("tabular", "amazon", "atomic")
IntArray = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PrepareReport:
    """What was written, and what was left out on the way (`notes`: kind and count; `examples`: a few of each)."""

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
    quarantined: int  # bad records: what and where stands in the domain's quarantine.jsonl
    seconds: float

    def lines(self) -> list[str]:
        """For the terminal."""
        told = [
            f"{self.domain}: {self.users:,} users, {self.items:,} items, {self.interactions:,} interactions",
            f"items with text {self.with_text:,}, with price {self.with_price:,}, with images {self.with_image:,}",
        ]
        told += format_tally(self.notes, self.examples)
        if self.quarantined:
            file = Path(self.folder) / QUARANTINE_NAME
            told.append(f"bad records set aside: {self.quarantined:,}, each with its place and reason in {file}")
        return [*told, f"wrote {self.folder} ({self.blocks:,} blocks, {self.seconds:.1f} s), {self.fingerprint[:16]}"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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
    """Read, filter, order, split and pack a domain into `out/domain/`; whole or not at all.

    Args:
        source: folder with the source files; for tabular and amazon, `interactions` and `items` may name them instead.
        format: the source's form.
        images: amazon only: a folder of images named by asin.
        columns: tabular only: the file's name of a column where it differs.
        k_core: keep only users and items with at least this many interactions, iteratively (users: never fewer than
            three). None: off; then every item of the items file stays, touched or not.
        max_sequence: cut every user to the most recent so many. None: off.
        drop_unknown: drop interactions with items that the items file lacks, instead of refusing them.
        max_bad: how many of a file's records may be bad and are then set aside (`antdist.data.quarantine`), as a share.
            Lines of interactions and items, interactions with unknown items, and images that are there but broken.
            The atomic form, whose rows check each other, allows none.
        overwrite: replace a prepared domain.
        block_users: users a block; smaller where a domain must give many ranks a block each.
        items_per_shard, blocks_per_shard: as in `write_domain`.

    Raises:
        UserError: the input is faulty, nothing is left of it, or the domain exists already.
    """
    start = time.monotonic()
    folder = Path(out) / domain
    check_name(domain)
    check_target_folder(folder, overwrite)
    _check_options(format, k_core, max_sequence, drop_unknown)
    check_sizes(block_users, items_per_shard, blocks_per_shard)
    quarantine = Quarantine(max_bad)
    data = read_source(
        source,
        format=format,
        interactions=interactions,
        items=items,
        images=images,
        columns=columns,
        touched_only=k_core is not None,
        quarantine=quarantine,
    )
    tally = data.tally
    places_by_id = {item.item_id: place for place, item in enumerate(data.items)}
    users, places, times = map_known_items(data, places_by_id, drop_unknown, quarantine)
    del places_by_id
    kept = select_interactions(users, places, k_core, tally)
    if not len(kept):
        raise UserError(
            _emptied(k_core), where=domain, remedy="use a smaller k-core or none, or bring more interactions"
        )
    sequences, codes = order_interactions(users[kept], places[kept], times[kept])
    catalogue, waiting = data.items, None
    if k_core is None:
        waiting = _waiting(data, users, places, times, kept)
    else:
        sequences, catalogue = _touched(sequences, data.items, k_core, tally)
    if max_sequence is not None:
        sequences = truncate_sequences(sequences, max_sequence, tally)
    counts = {"text": 0, "price": 0, "image": 0}
    manifest = write_domain(
        folder,
        domain,
        make_item_records(catalogue, counts, tally, quarantine),
        sequences,
        data.interactions.user_ids.take(codes).to_pylist(),
        # The notes grow while images are read; the manifest, written last, has them all.
        {"format": format, "k_core": k_core, "max_sequence": max_sequence, "notes": tally.counts},
        waiting=waiting,
        block_users=block_users,
        items_per_shard=items_per_shard,
        blocks_per_shard=blocks_per_shard,
        overwrite=overwrite,
    )
    if quarantine.records:
        write_quarantine(folder, quarantine.records)
    return _report(manifest, folder, counts, tally, quarantine, time.monotonic() - start)


# ------------------------------------------------------------------------------------------------------------- source


def read_source(
    source: str | Path | None,
    *,
    format: Format,
    interactions: str | Path | None = None,
    items: str | Path | None = None,
    images: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    touched_only: bool = False,
    quarantine: Quarantine | None = None,
    without_items: bool = False,
) -> Source:
    """Read source files by the reader of their form; see `prepare`. `touched_only`: amazon's items without a review are left
    out; `without_items`: a tabular source need not have an items file."""
    from antdist.data.ingest.readers.amazon import read_amazon
    from antdist.data.ingest.readers.atomic import read_atomic
    from antdist.data.ingest.readers.tabular import read_tabular

    if images is not None and format != "amazon":
        raise UserError(
            "is for the amazon form alone", where="--images", remedy="name images in the items file's `image`"
        )
    if columns and format != "tabular":
        raise UserError("is for the tabular form alone", where="--column")
    if format == "atomic":
        if source is None or interactions is not None or items is not None:
            raise UserError(
                "the atomic form is read from a folder", remedy="give the folder that holds NAME.train.inter"
            )
        return read_atomic(Path(source))
    if format == "amazon":
        metadata = _given(items) or _only(source, "meta_*", "--items", lambda _: True)
        reviews = _given(interactions) or _only(
            source, "*.json*", "--interactions", lambda path: not path.name.startswith("meta_")
        )
        return read_amazon(reviews, metadata, _given(images), touched_only=touched_only, quarantine=quarantine)
    return read_tabular(
        _given(interactions) or _only(source, "interactions.*", "--interactions", lambda _: True),
        _given(items) or _items_file(source, without_items),
        columns,
        quarantine,
    )


def _items_file(source: str | Path | None, may_lack: bool) -> Path | None:
    if may_lack and (source is None or not any(Path(source).glob("items.*"))):
        return None
    return _only(source, "items.*", "--items", lambda _: True)


def _given(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _only(source: str | Path | None, pattern: str, option: str, wanted: Callable[[Path], bool]) -> Path:
    """The one file of the folder that matches."""
    if source is None:
        raise UserError("no source folder is given", remedy=f"give SRC, or the file with {option}")
    folder = Path(source)
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, remedy=f"give a folder, or the file with {option}")
    found = sorted(path for path in folder.glob(pattern) if path.is_file() and wanted(path))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        what = f"one file {pattern} was due, there are {len(found)} ({names})"
        raise UserError(what, where=folder, remedy=f"name the file with {option} FILE")
    return found[0]


def check_sizes(*sizes: int | None) -> None:
    """Raises UserError unless block and shard sizes are positive, or None."""
    for size in sizes:
        if size is not None and size < 1:
            raise UserError(f"users a block, items a shard and blocks a shard must be positive, not {size}")


def _check_options(format: Format, k_core: int | None, max_sequence: int | None, drop_unknown: bool) -> None:
    if format not in FORMATS:
        raise UserError(f"no form is called {format!r}", where="--format", remedy=f"use one of {', '.join(FORMATS)}")
    if format == "atomic" and (k_core is not None or max_sequence is not None or drop_unknown):
        what = "the atomic form keeps its published split, so nothing can be filtered or cut"
        raise UserError(what, where="--format", remedy="leave out --k-core, --max-sequence and --drop-unknown")
    if k_core is not None and k_core < 1:
        raise UserError(f"is {k_core}, at least 1 was due", where="--k-core")
    if max_sequence is not None and max_sequence < MIN_INTERACTIONS:
        raise UserError(f"is {max_sequence}, at least {MIN_INTERACTIONS} was due", where="--max-sequence")


# ---------------------------------------------------------------------------------------------------------- filtering


def map_known_items(
    data: Source, at: Mapping[str, int], drop_unknown: bool, quarantine: Quarantine, among: str = "the items file"
) -> tuple[IntArray, IntArray, NDArray[Any]]:
    """Users, items (as `at` numbers them) and times of the interactions whose item is known; `among` says for messages where
    items are known from."""
    ids = data.interactions.item_ids.to_pylist()
    resolve_place = np.fromiter((at.get(item_id, -1) for item_id in ids), np.int32, len(ids))
    users, places, times = data.interactions.users, resolve_place[data.interactions.items], data.interactions.times
    unknown = int((places < 0).sum())
    if not unknown:
        return users, places, times
    first = ids[data.interactions.items[np.argmax(places < 0)]]
    if unknown <= max_bad_records(len(places), quarantine.max_bad):
        for code, count in enumerate(np.bincount(data.interactions.items[places < 0])):
            if count:
                what = f"{count:,} interactions with an item that is not in {among}"
                quarantine.records.append(BadRecord(str(data.interactions.file), None, ids[code], what))
    elif not drop_unknown:
        what = f"item {first} is not in {among} (so it is with {unknown:,} interactions in all)"
        raise UserError(what, where=data.interactions.find_item(first), remedy="add it, or use --drop-unknown")
    data.tally.add("interactions dropped: item unknown", unknown, f"item {first}")
    known = places >= 0
    return users[known], places[known], times[known]


def select_interactions(users: IntArray, items: IntArray, k_core: int | None, tally: Tally) -> NDArray[np.int64]:
    """Positions of the interactions that stay, in input order: by iterative k-core, or users of three or more alone.

    Args:
        users, items: (T,) code of each interaction's user and item.
        k_core: least interactions of a user (but never fewer than three) and of an item; None: no k-core.
    """
    least_user, least_item = (MIN_INTERACTIONS, 0) if k_core is None else (max(k_core, MIN_INTERACTIONS), k_core)
    kept, kept_users, kept_items = np.arange(len(users)), users, items
    while True:
        enough = (np.bincount(kept_users) >= least_user)[kept_users]
        enough &= (np.bincount(kept_items) >= least_item)[kept_items]
        if enough.all():
            break
        kept, kept_users, kept_items = kept[enough], kept_users[enough], kept_items[enough]
    why = "fewer than three interactions" if k_core is None else f"{k_core}-core"
    dropped = _distinct(users) - _distinct(kept_users)
    tally.add(f"users dropped: {why}", dropped)
    tally.add(f"interactions dropped: {why}", len(users) - len(kept))
    return kept


def _waiting(
    data: Source, users: IntArray, items: IntArray, times: NDArray[Any], kept: NDArray[np.int64]
) -> tuple[Sequences, list[str]] | None:
    """The users with too few interactions, and their ids; None if there are none."""
    short = np.ones(len(users), bool)
    short[kept] = False
    if not short.any():
        return None
    sequences, codes = order_interactions(users[short], items[short], times[short])
    return sequences, data.interactions.user_ids.take(codes).to_pylist()


def _distinct(codes: IntArray) -> int:
    return int(np.count_nonzero(np.bincount(codes)))


def _emptied(k_core: int | None) -> str:
    if k_core is None:
        return "no user has three interactions or more, so nothing is left"
    return f"the {k_core}-core is empty: no user and item with at least {k_core} interactions are left"


def _touched(sequences: Sequences, items: list[Item], k_core: int, tally: Tally) -> tuple[Sequences, list[Item]]:
    """Only the items that occur, renumbered in their old order."""
    touched = np.bincount(sequences.items, minlength=len(items)) > 0
    renumbered = np.cumsum(touched) - 1
    tally.add(f"items dropped: {k_core}-core", len(items) - int(touched.sum()))
    left = [items[place] for place in np.flatnonzero(touched)]
    return replace(sequences, items=renumbered[sequences.items]), left


# ----------------------------------------------------------------------------------------------------------- ordering


def order_interactions(users: IntArray, items: IntArray, times: NDArray[Any]) -> tuple[Sequences, NDArray[np.int64]]:
    """Users one after the other by code, each in time order; equal times keep the input's order.

    Returns the sequences and the code of each user in them.
    """
    by_user_and_time = np.argsort(times, kind="stable")
    # a user's code in two halves, the lower first: numpy sorts 16 bits by radix, several times as fast as 32
    for half in users.astype("<u4").view("<u2").reshape(-1, 2).T:
        by_user_and_time = by_user_and_time[np.argsort(half[by_user_and_time], kind="stable")]
    lengths = np.bincount(users)
    codes = np.flatnonzero(lengths)
    offsets = ragged.offsets(lengths[codes])
    in_order = times[by_user_and_time]
    return Sequences(offsets, items[by_user_and_time].astype(np.int64), in_order.astype(np.int64)), codes


def truncate_sequences(sequences: Sequences, longest: int, tally: Tally) -> Sequences:
    """Every user cut to the most recent `longest` interactions."""
    lengths = np.diff(sequences.offsets)
    to_end = np.repeat(sequences.offsets[1:], lengths) - np.arange(len(sequences.items))
    recent = to_end <= longest
    tally.add(f"interactions dropped: before a user's most recent {longest}", int((~recent).sum()))
    offsets = ragged.offsets(np.minimum(lengths, longest))
    return Sequences(offsets, sequences.items[recent], sequences.times[recent])


# -------------------------------------------------------------------------------------------------------------- items


def make_item_records(
    items: list[Item], counts: dict[str, int], tally: Tally, quarantine: Quarantine, first: int = 0
) -> Iterator[ItemRecord]:
    """The items, with indices from `first` on, with their image bytes; counts what is there, and tallies images that cannot be
    used. Those that are there but broken go into quarantine."""
    seen = 0
    broken: list[BadRecord] = []
    for index, item in enumerate(track(items, "packing items", len(items)), first):
        images = []
        for path in item.images:
            seen += 1
            try:
                images.append(load_image(path))
            except BrokenImageError as fault:
                tally.add(f"images dropped: {fault}", example=f"{path} of item {item.item_id}")
                if str(fault) != MISSING:
                    broken.append(BadRecord(str(path), None, item.item_id, f"image dropped: {fault}"))
                    if len(broken) % EARLY_CHECK == 0:
                        _check_images(broken, seen, quarantine)
        counts["text"] += item.text is not None
        counts["price"] += item.price is not None
        counts["image"] += bool(images)
        yield ItemRecord(index, item.item_id, item.text, item.price, images)
    _check_images(broken, seen, quarantine)
    quarantine.records += broken


def _check_images(broken: list[BadRecord], seen: int, quarantine: Quarantine) -> None:
    most = max_bad_records(seen, quarantine.max_bad)
    if len(broken) > most:
        raise UserError(
            f"{len(broken):,} of {seen:,} images cannot be used, {most:,} may be: {broken[0].reason} "
            f"(item {broken[0].key})",
            where=broken[0].file,
            remedy="mend the images, or allow more with --max-bad",
        )


def _report(
    manifest: Manifest, folder: Path, counts: dict[str, int], tally: Tally, quarantine: Quarantine, seconds: float
) -> PrepareReport:
    return PrepareReport(
        domain=manifest.domain,
        folder=str(folder),
        users=manifest.users,
        items=manifest.items,
        interactions=manifest.interactions,
        with_text=counts["text"],
        with_price=counts["price"],
        with_image=counts["image"],
        blocks=manifest.blocks,
        fingerprint=manifest.fingerprint,
        notes=tally.counts,
        examples=tally.examples,
        quarantined=len(quarantine.records),
        seconds=seconds,
    )
