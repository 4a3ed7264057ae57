"""Pack the items of a source: load their images, and count and quarantine those that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from antdist.data.images import MISSING, BrokenImageError, load_image
from antdist.data.ingest.readers.base import Item, Tally
from antdist.data.quarantine import EARLY_CHECK, BadRecord, Quarantine, max_bad_records
from antdist.data.shards import ItemRecord
from antdist.errors import UserError
from antdist.io.progress import track


@dataclass
class ModalityCounts:
    """How many items have each modality."""

    text: int = 0
    price: int = 0
    image: int = 0


def make_item_records(
    items: list[Item], counts: ModalityCounts, tally: Tally, quarantine: Quarantine, first: int = 0
) -> Iterator[ItemRecord]:
    """Load the images of the items, and number the items from `first` on.

    Args:
        counts: incremented for each item.
        tally: counts images that cannot be used.
        quarantine: takes images that exist but cannot be decoded.

    Raises:
        UserError: more images are broken than may be quarantined.
    """
    seen = 0
    broken: list[BadRecord] = []
    for index, item in enumerate(track(items, "packing items", len(items)), first):
        images = []
        for path in item.images:
            seen += 1
            try:
                images.append(load_image(path))
            except BrokenImageError as error:
                tally.add(f"images dropped: {error}", example=f"{path} of item {item.item_id}")
                if str(error) != MISSING:
                    broken.append(BadRecord(str(path), None, item.item_id, f"image dropped: {error}"))
                    if len(broken) % EARLY_CHECK == 0:
                        _check_broken(broken, seen, quarantine)
        counts.text += item.text is not None
        counts.price += item.price is not None
        counts.image += bool(images)
        yield ItemRecord(index, item.item_id, item.text, item.price, images)
    _check_broken(broken, seen, quarantine)
    quarantine.records += broken


def _check_broken(broken: list[BadRecord], seen: int, quarantine: Quarantine) -> None:
    most = max_bad_records(seen, quarantine.max_bad)
    if len(broken) > most:
        raise UserError(
            f"{len(broken):,} of {seen:,} images cannot be used, at most {most:,} may be: {broken[0].reason} "
            f"(item {broken[0].key})",
            where=broken[0].file,
            remedy="fix the images, or allow more with --max-bad",
        )
