"""The format `amazon`: raw reviews and metadata."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from antdist.data.domain import open_domain
from antdist.data.ingest.prepare import prepare_domain
from antdist.data.ingest.readers.amazon import read_amazon
from antdist.errors import UserError

META: list[dict[str, Any]] = [
    {
        "asin": "A1",
        "title": "Cards &amp; more",
        "category": ["Gift Cards", "Gift Cards"],
        "brand": "Acme",
        "price": "$1,299.00",
    },
    {"asin": "A2", "title": "var aPageStart = (new Date()).getTime();", "category": [], "brand": "", "price": ""},
    {"asin": "A1", "title": "again", "category": [], "brand": "", "price": "$2.00"},
    {
        "asin": "A3",
        "title": "Range",
        "category": "odd",
        "brand": None,
        "price": "$5 - $10",
        "imageURL": ["http://x/y.jpg"],
    },
]
REVIEWS = [
    {"reviewerID": f"R{n % 3}", "asin": f"A{n % 2 + 1}", "unixReviewTime": 100 - n, "reviewText": "x"} for n in range(9)
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, rows in (("Gifts_5.json.gz", REVIEWS), ("meta_Gifts.json.gz", META)):
        (tmp_path / name).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return tmp_path


def test_items_and_what_was_missing(source: Path) -> None:
    found = read_amazon(source / "Gifts_5.json.gz", source / "meta_Gifts.json.gz")
    assert [(item.item_id, item.text, item.price, item.images) for item in found.items] == [
        ("A1", "Cards & more. Gift Cards. Acme", 1299.0, ()),
        ("A2", None, None, ()),
        ("A3", "Range", None, ()),
    ]
    assert found.tally.counts == {
        "titles treated as missing: a page's script": 1,
        "metadata lines dropped: the item came before": 1,
        "prices treated as missing: a range": 1,
    }
    assert found.tally.examples["metadata lines dropped: the item came before"] == ["line 3, item A1"]


def test_reviews_in_input_order(source: Path) -> None:
    found = read_amazon(source / "Gifts_5.json.gz", source / "meta_Gifts.json.gz").interactions
    assert found.user_ids.to_pylist() == ["R0", "R1", "R2"] and found.item_ids.to_pylist() == ["A1", "A2"]
    assert found.times.tolist() == list(range(100, 91, -1))


def test_local_images_by_asin(source: Path) -> None:
    folder = source / "pictures"
    folder.mkdir()
    for name in ("A1.jpg", "A1_10.jpg", "A1_2.JPG", "A1_3.png", "A1_4.jpg", "A2_1.jpg", "A3.txt"):
        (folder / name).touch()
    found = read_amazon(source / "Gifts_5.json.gz", source / "meta_Gifts.json.gz", folder)
    names = [[path.name for path in item.images] for item in found.items]
    assert names == [["A1.jpg", "A1_2.JPG", "A1_3.png", "A1_4.jpg"], ["A2_1.jpg"], []]
    assert found.tally.counts["images left out: more than 4 of an item"] == 1


def test_prepare_finds_the_two_files(source: Path) -> None:
    report = prepare_domain(source, format="amazon", domain="gifts", out=source / "out", k_core=2)
    assert (report.users, report.items, report.interactions) == (3, 2, 9)
    assert report.notes["items dropped: no review"] == 1
    assert open_domain(source / "out" / "gifts").item_ids() == ["A1", "A2"]


def test_line_without_asin_is_refused(source: Path) -> None:
    (source / "meta.json").write_text('{"asin": "A1"}\n{"title": "x"}\n')
    with pytest.raises(UserError, match=r"meta\.json:2: empty asin"):
        read_amazon(source / "Gifts_5.json.gz", source / "meta.json")


def test_real_gift_cards(shared_data: Path, tmp_path: Path) -> None:
    report = prepare_domain(shared_data / "formats" / "amazon-raw", format="amazon", domain="gifts", out=tmp_path)
    with gzip.open(shared_data / "formats" / "amazon-raw" / "Gift_Cards_5.json.gz", "rt") as lines:
        reviews = [json.loads(line) for line in lines]
    counts: dict[str, int] = {}
    for review in reviews:
        counts[review["reviewerID"]] = counts.get(review["reviewerID"], 0) + 1
    kept = [count for count in counts.values() if count >= 3]
    assert (report.users, report.interactions) == (len(kept), sum(kept))
    assert report.items == 1547 and report.with_price == 358
