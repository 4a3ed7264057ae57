"""Find and read the files of a source by the reader of its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from antdist.data.ingest.readers.amazon import read_amazon
from antdist.data.ingest.readers.atomic import read_atomic
from antdist.data.ingest.readers.base import SourceData
from antdist.data.ingest.readers.tabular import read_tabular
from antdist.data.quarantine import BadRecord, Quarantine, max_bad_records
from antdist.errors import UserError

Format = Literal["tabular", "amazon", "atomic"]
FORMATS: tuple[Format, ...] = ("tabular", "amazon", "atomic")
Codes = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class SourceFiles:
    """Where a source lies, and how to read it.

    Args:
        folder: holds the source files; for tabular and amazon, `interactions` and `items` may name them instead.
        images: amazon only: a folder of images named by asin.
        columns: tabular only: the file's name of a column where it differs, `{"user_id": "customer"}`.
    """

    folder: str | Path | None = None
    format: Format = "tabular"
    interactions: str | Path | None = None
    items: str | Path | None = None
    images: str | Path | None = None
    columns: Mapping[str, str] | None = None


def read_source(
    files: SourceFiles, *, touched_only: bool = False, quarantine: Quarantine | None = None, items_required: bool = True
) -> SourceData:
    """Read a source by the reader of its format.

    Args:
        touched_only: amazon: leave out items without a review.
        quarantine: takes bad records; None: the first one is refused.
        items_required: False: a tabular source may lack an items file.

    Raises:
        UserError: a file is missing or faulty, or an option does not fit the format.
    """
    if files.images is not None and files.format != "amazon":
        remedy = "name image files in the `image` column of the items file"
        raise UserError("works with --format amazon only", where="--images", remedy=remedy)
    if files.columns and files.format != "tabular":
        raise UserError("works with --format tabular only", where="--column", remedy="leave it out")
    if files.format == "atomic":
        if files.folder is None or files.interactions is not None or files.items is not None:
            what, remedy = "--format atomic reads a folder, not single files", "give the folder with NAME.train.inter"
            raise UserError(what, where="--format", remedy=remedy)
        return read_atomic(Path(files.folder))
    if files.format == "amazon":
        metadata = _path(files.items) or _find_file(files.folder, "meta_*", "--items")
        reviews = _path(files.interactions) or _find_file(
            files.folder, "*.json*", "--interactions", lambda path: not path.name.startswith("meta_")
        )
        return read_amazon(reviews, metadata, _path(files.images), touched_only=touched_only, quarantine=quarantine)
    interactions = _path(files.interactions) or _find_file(files.folder, "interactions.*", "--interactions")
    items = _path(files.items)
    if items is None and (items_required or (files.folder is not None and any(Path(files.folder).glob("items.*")))):
        items = _find_file(files.folder, "items.*", "--items")
    return read_tabular(interactions, items, files.columns, quarantine)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _find_file(
    folder: str | Path | None, pattern: str, option: str, accepts: Callable[[Path], bool] = lambda _: True
) -> Path:
    """Find the one file of the folder that matches."""
    if folder is None:
        raise UserError("no source folder given", remedy=f"give SRC, or name the file with {option} FILE")
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, remedy=f"give a folder, or name the file with {option} FILE")
    found = sorted(path for path in folder.glob(pattern) if path.is_file() and accepts(path))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        what = f"expected one file {pattern}, found {len(found)} ({names})"
        raise UserError(what, where=folder, remedy=f"name the file with {option} FILE")
    return found[0]


def map_known_items(
    data: SourceData,
    index_of: Mapping[str, int],
    drop_unknown: bool,
    quarantine: Quarantine,
    among: str = "the items file",
) -> tuple[Codes, Codes, NDArray[Any]]:
    """Return users, items and times, each (T,), of the interactions whose item is known.

    Args:
        index_of: index of each known item, by its id; returned in place of the source's item codes.
        drop_unknown: drop interactions with unknown items, however many there are.
        quarantine: takes a few interactions with unknown items.
        among: where items are known from, for messages.

    Raises:
        UserError: more interactions name an unknown item than may be quarantined, and `drop_unknown` is off.
    """
    found = data.interactions
    ids = found.item_ids.to_pylist()
    indices = np.fromiter((index_of.get(item_id, -1) for item_id in ids), np.int32, len(ids))
    users, items, times = found.users, indices[found.items], found.times
    is_known = items >= 0
    unknown = len(items) - int(is_known.sum())
    if not unknown:
        return users, items, times
    first = ids[found.items[np.argmin(is_known)]]
    if unknown <= max_bad_records(len(items), quarantine.max_bad):
        for code, count in enumerate(np.bincount(found.items[~is_known])):
            if count:
                reason = f"{count:,} interactions with an item that is not in {among}"
                quarantine.records.append(BadRecord(str(found.file), None, ids[code], reason))
    elif not drop_unknown:
        what = f"item {first!r} is not in {among} ({unknown:,} interactions name an unknown item)"
        remedy = "add the item, or drop such interactions with --drop-unknown"
        raise UserError(what, where=found.find_item(first), remedy=remedy)
    data.tally.add("interactions dropped: item unknown", unknown, f"item {first}")
    return users[is_known], items[is_known], times[is_known]
