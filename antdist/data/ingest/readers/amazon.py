"""Read the format `amazon`: raw Amazon reviews 2018, reviews and metadata as JSON lines, gzip or not."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from antdist.data.ingest.readers.base import MOST_IMAGES, Item, SourceData, Tally, compose_text, read_price
from antdist.data.ingest.readers.columns import read_interactions
from antdist.data.ingest.readers.files import check_file, is_valid_text, read_json_rows
from antdist.data.quarantine import Quarantine
from antdist.errors import UserError

COLUMNS = {"user_id": "reviewerID", "item_id": "asin", "timestamp": "unixReviewTime"}
# Some titles of this data set are scripts of the page, a known fault.
SCRIPT_TITLE = "getTime"


def read_amazon(
    reviews: Path,
    metadata: Path,
    images: Path | None = None,
    *,
    touched_only: bool = False,
    quarantine: Quarantine | None = None,
) -> SourceData:
    """Read a category of Amazon reviews 2018.

    Item text is title, categories and brand (docs/spec/ant.md, section 1). Image URLs in the metadata are not downloaded.

    Args:
        reviews: lines with `reviewerID`, `asin`, `unixReviewTime`.
        metadata: lines with `asin`, `title`, `category`, `brand`, `price`; of lines with equal asin the first is used.
        images: a folder with images named `ASIN.jpg` or `ASIN_*.jpg` (or png), up to four an item.
        touched_only: leave out items without a review to save memory; a k-core drops them in any case.
        quarantine: takes bad lines; None: the first one is refused.

    Raises:
        UserError: naming file and line.
    """
    check_file(metadata)
    interactions = read_interactions(reviews, COLUMNS, quarantine)
    touched = set(interactions.item_ids.to_pylist()) if touched_only else None
    tally = Tally()
    pictures = _find_images(images) if images else {}
    items: dict[str, Item] = {}
    bad = (quarantine or Quarantine()).inspect(metadata)
    for line, row in read_json_rows(metadata, bad):
        asin = row.get("asin")
        if not isinstance(asin, str) or not asin.strip() or not is_valid_text(asin):
            bad.add(UserError("empty asin", where=f"{metadata}:{line}", remedy="delete the line"), line)
            continue
        bad.good += 1
        if touched is not None and asin not in touched:
            tally.add("items dropped: no review")
            continue
        if asin in items:
            tally.add("metadata lines dropped: the item came before", example=f"line {line}, item {asin}")
            continue
        found = pictures.get(asin, [])
        tally.add(
            f"images left out: more than {MOST_IMAGES} of an item", max(len(found) - MOST_IMAGES, 0), f"item {asin}"
        )
        items[asin] = Item(
            asin,
            _make_amazon_text(row, asin, tally),
            read_price(row.get("price"), asin, tally),
            tuple(found[:MOST_IMAGES]),
        )
    bad.close()
    return SourceData(interactions, list(items.values()), tally)


def _make_amazon_text(row: dict[str, Any], asin: str, tally: Tally) -> str | None:
    title, categories, brand = row.get("title"), row.get("category"), row.get("brand")
    if isinstance(title, str) and SCRIPT_TITLE in title:
        tally.add("titles treated as missing: a page's script", example=f"item {asin}")
        title = None
    names = categories if isinstance(categories, list) else []
    return compose_text(
        title if isinstance(title, str) else None,
        [name for name in names if isinstance(name, str)],
        brand if isinstance(brand, str) else None,
    )


def _find_images(folder: Path) -> dict[str, list[Path]]:
    """Find image files by asin, in the order `ASIN`, `ASIN_1`, `ASIN_10`."""
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, remedy="check --images")
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir(), key=lambda path: (len(path.stem), path.name)):
        if re.fullmatch(r"\.(jpe?g|png)", path.suffix, re.IGNORECASE) and path.is_file():
            found[path.stem.partition("_")[0]].append(path)
    return found
