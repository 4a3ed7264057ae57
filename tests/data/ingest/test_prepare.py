"""Preparation: filters, order and packing against naive twins; what is left out is counted and reported."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from antdist import ragged
from antdist.data.domain import Sequences, open_domain
from antdist.data.ingest.histories import order_interactions, select_interactions, truncate_sequences
from antdist.data.ingest.prepare import PrepareReport, prepare_domain
from antdist.data.ingest.readers.base import Tally
from antdist.data.verify import verify_domain
from antdist.errors import UserError
from tests.pictures import png_of_stated_size

Pairs = list[tuple[int, int]]
pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


def naive_k_core(rows: Pairs, k: int) -> list[int]:
    kept = list(range(len(rows)))
    while True:
        users = Counter(rows[n][0] for n in kept)
        items = Counter(rows[n][1] for n in kept)
        left = [n for n in kept if users[rows[n][0]] >= max(k, 3) and items[rows[n][1]] >= k]
        if left == kept:
            return kept
        kept = left


@settings(max_examples=150, deadline=None)
@given(rows=pairs, k=st.integers(1, 6))
def test_k_core_equals_the_naive_iteration(rows: Pairs, k: int) -> None:
    users, items = np.array(rows, np.int32).T
    tally = Tally()
    kept = select_interactions(users, items, k, tally)
    assert kept.tolist() == naive_k_core(rows, k)
    lost = len({u for u, _ in rows}) - len({rows[n][0] for n in kept})
    assert tally.counts.get(f"users dropped: {k}-core", 0) == lost
    assert tally.counts.get(f"interactions dropped: {k}-core", 0) == len(rows) - len(kept)


@settings(max_examples=50, deadline=None)
@given(rows=pairs)
def test_without_k_core_only_short_users_are_dropped(rows: Pairs) -> None:
    users, items = np.array(rows, np.int32).T
    counts = Counter(user for user, _ in rows)
    kept = select_interactions(users, items, None, Tally())
    assert kept.tolist() == [n for n, (user, _) in enumerate(rows) if counts[user] >= 3]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40), kind=st.sampled_from("if")
)
def test_order_is_by_time_and_stable(rows: Pairs, kind: str) -> None:
    users = np.array([user for user, _ in rows], np.int32)
    times = np.array([time for _, time in rows], "int64" if kind == "i" else "float64")
    sequences, codes = order_interactions(
        users, np.arange(len(rows), dtype=np.int32), times
    )  # an item names its place in the input
    assert codes.tolist() == sorted(set(users.tolist()))
    for code, start, end in zip(codes, sequences.offsets[:-1], sequences.offsets[1:], strict=True):
        mine = [n for n, (user, _) in enumerate(rows) if user == code]
        assert sequences.items[start:end].tolist() == sorted(mine, key=lambda n: rows[n][1])  # sorted() is stable
        assert sequences.times[start:end].tolist() == [int(times[n]) for n in sequences.items[start:end]]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(3, 9), min_size=1, max_size=9), longest=st.integers(3, 9))
def test_truncation_keeps_the_most_recent(lengths: list[int], longest: int) -> None:
    whole = [list(range(100 * user, 100 * user + length)) for user, length in enumerate(lengths)]
    flat = np.array([item for items in whole for item in items])
    tally = Tally()
    found = truncate_sequences(Sequences(ragged.offsets(lengths), flat, flat), longest, tally)
    parts = [found.items[a:b].tolist() for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]
    assert parts == [items[-longest:] for items in whole]
    assert sum(tally.counts.values()) == len(flat) - len(found.items)


# ------------------------------------------------------------------------------------------------------------ end to end

ROWS = [("v", "b"), ("u", "a"), ("u", "b"), ("v", "a"), ("u", "c"), ("v", "b"), ("w", "a"), ("w", "b")]


def source(folder: Path, rows: list[tuple[str, str]] = ROWS, items: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    lines = ["user_id,item_id,timestamp", *(f"{user},{item},{n}" for n, (user, item) in enumerate(rows))]
    (folder / "interactions.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    items = [{"item_id": name} for name in "dcba"] if items is None else items
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def prepared(tmp_path: Path, *, rows: Any = ROWS, items: Any = None, **options: Any) -> PrepareReport:
    return prepare_domain(source(tmp_path / "source", rows, items), domain="d", out=tmp_path / "out", **options)


def test_short_users_are_dropped_and_untouched_items_kept(tmp_path: Path) -> None:
    report = prepared(tmp_path)
    domain = open_domain(tmp_path / "out" / "d")
    assert domain.user_ids() == ["v", "u"]  # order of first appearance
    assert domain.item_ids() == ["d", "c", "b", "a"]  # order of the items file, zero-shot items included
    assert domain.sequences().items.tolist() == [2, 3, 2, 3, 2, 1]
    assert domain.popularity().tolist() == [0, 0, 1, 1]
    assert report.notes == {
        "users dropped: fewer than three interactions": 1,
        "interactions dropped: fewer than three interactions": 2,
    }
    assert "users dropped: fewer than three interactions: 1" in report.lines()
    assert domain.manifest.made == {"format": "tabular", "k_core": None, "max_sequence": None, "notes": report.notes}
    assert report.fingerprint == domain.fingerprint and report.to_json()["users"] == 2


def test_k_core_leaves_only_items_that_survive(tmp_path: Path) -> None:
    rows = [(user, item) for item in "abe" for user in "uvw"] + [("u", "c")]
    items = [{"item_id": name} for name in "edcba"]
    report = prepared(tmp_path, rows=rows, items=items, k_core=3)
    domain = open_domain(tmp_path / "out" / "d")
    assert domain.item_ids() == ["e", "b", "a"]
    assert domain.sequences().items.tolist() == [2, 1, 0] * 3
    assert report.notes == {"interactions dropped: 3-core": 1, "items dropped: 3-core": 2}


def test_max_sequence_keeps_the_most_recent(tmp_path: Path) -> None:
    rows = [("u", item) for item in "abcdabcd"]
    report = prepared(tmp_path, rows=rows, max_sequence=3)
    assert open_domain(tmp_path / "out" / "d").sequences().items.tolist() == [2, 1, 0]
    assert report.notes == {"interactions dropped: before a user's most recent 3": 5}


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    for out in ("one", "two"):
        prepare_domain(folder, domain="d", out=tmp_path / out, block_users=1)
    names = sorted(path.name for path in (tmp_path / "one" / "d").iterdir())
    waiting = ["pending.json", "pending.tar"]  # beside the domain: its manifest does not know them
    assert names == ["items-00000.tar", "manifest.json", *waiting, "popularity.npy", "sequences-00000.tar"]
    for name in names:
        assert (tmp_path / "one" / "d" / name).read_bytes() == (tmp_path / "two" / "d" / name).read_bytes()


def test_broken_images_are_counted_and_quarantined(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    Image.new("RGB", (20, 10), "red").save(folder / "good.jpg")
    Image.new("L", (20, 10), 99).save(folder / "grey.jpg")
    Image.new("RGB", (900, 600), "blue").save(folder / "large.png")
    (folder / "broken.jpg").write_bytes((folder / "good.jpg").read_bytes()[:200])
    (folder / "zero.jpg").touch()
    (folder / "bomb.png").write_bytes(png_of_stated_size(60_000, 60_000))
    items = [
        {"item_id": "a", "image": ["good.jpg", "grey.jpg", "large.png", "broken.jpg"]},
        {"item_id": "b", "image": ["zero.jpg", "nowhere.jpg", "bomb.png"]},
        {"item_id": "c", "image": None},
    ]
    with pytest.raises(UserError, match=r"broken\.jpg: 3 of 7 images cannot be used, at most 0 may be.*--max-bad"):
        prepared(tmp_path, items=items)
    assert not (tmp_path / "out" / "d").exists()
    report = prepared(tmp_path, items=items, max_bad=0.5)
    found = {item.item_id: item.images for item in open_domain(tmp_path / "out" / "d").items()}
    assert found["a"][:2] == [(folder / "good.jpg").read_bytes(), (folder / "grey.jpg").read_bytes()]
    assert len(found["a"]) == 3 and found["a"][2].startswith(b"\xff\xd8")
    assert found["b"] == [] and report.with_image == 1
    dropped = {kind.partition(": ")[2]: count for kind, count in report.notes.items() if kind.startswith("images")}
    assert dropped == {"broken (OSError)": 1, "empty file": 1, "missing": 1, "too many pixels": 1}
    assert f"  {folder / 'nowhere.jpg'} of item b" in report.lines()
    assert [(Path(r["file"]).name, r["key"], r["reason"]) for r in quarantined(tmp_path)] == [
        ("broken.jpg", "a", "image dropped: broken (OSError)"),
        ("zero.jpg", "b", "image dropped: empty file"),
        ("bomb.png", "b", "image dropped: too many pixels"),
    ]  # what is missing is no bad record


def quarantined(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "d" / "quarantine.jsonl").read_text().splitlines()]


POISON = [
    "u7,b,yesterday",
    "u8,c",
    "u9,,5",
    "u1,a,1,2",
    "u2,b,1e999",
]


def large(folder: Path, poison: list[bytes], places: list[int]) -> Path:
    """1,000 lines of 100 users and 4 items, some of them bad."""
    source(folder)
    lines = [f"user{n % 100},{'abcd'[n % 4]},{n}".encode() for n in range(1000)]
    for line, place in zip(poison, places, strict=True):
        lines.insert(place, line)
    (folder / "interactions.csv.gz").unlink()
    (folder / "interactions.csv").write_bytes(b"\n".join([b"user_id,item_id,timestamp", *lines]))
    return folder


def test_bad_lines_are_quarantined_with_line_and_reason(tmp_path: Path) -> None:
    poison = [*(line.encode() for line in POISON[:4]), b"caf\xe9,a,3"]
    folder = large(tmp_path / "bad", poison, [0, 17, 400, 401, 1004])
    report = prepare_domain(folder, domain="d", out=tmp_path / "out")
    found = quarantined(tmp_path)
    assert [(r["line"], r["reason"]) for r in found] == [
        (2, "timestamp 'yesterday' is not a number"),
        (19, "too few columns: 2, the header has 3"),
        (402, "empty item_id"),
        (403, "too many columns: 4, the header has 3"),
        (1006, "is not UTF-8 text"),
    ]
    assert all(r["file"] == str(folder / "interactions.csv") for r in found)
    assert report.quarantined == 5 and "bad records quarantined: 5, listed" in report.lines()[-2]
    # the rest is what it would have been without them
    clean = prepare_domain(large(tmp_path / "good", [], []), domain="d", out=tmp_path / "clean")
    for name in ("sequences-00000.tar", "items-00000.tar", "popularity.npy"):
        assert (tmp_path / "out" / "d" / name).read_bytes() == (tmp_path / "clean" / "d" / name).read_bytes()
    assert clean.quarantined == 0 and not (tmp_path / "clean" / "d" / "quarantine.jsonl").exists()
    assert verify_domain(tmp_path / "out" / "d").ok


def test_more_bad_lines_than_the_cap_raise_the_first_fault(tmp_path: Path) -> None:
    folder = large(tmp_path / "bad", [line.encode() for line in [*POISON, "x"]], [0, 1, 2, 3, 4, 900])
    with pytest.raises(UserError) as caught:
        prepare_domain(folder, domain="d", out=tmp_path / "out")
    assert caught.value.where == f"{folder / 'interactions.csv'}:2"
    assert "timestamp 'yesterday' is not a number (6 of 1,006 records are bad, at most 5 may be)" in str(caught.value)
    assert not (tmp_path / "out" / "d").exists()
    assert prepare_domain(folder, domain="d", out=tmp_path / "out", max_bad=0.006).quarantined == 6
    with pytest.raises(UserError, match="is not a number"):
        prepare_domain(
            large(tmp_path / "one", [POISON[0].encode()], [5]), domain="e", out=tmp_path / "out", max_bad=0.0
        )


def test_open_quote_counts_every_line_it_spans(tmp_path: Path) -> None:
    folder = large(tmp_path / "bad", [b'"open,a,1'], [700])
    with pytest.raises(UserError, match="301 of 1,001 records are bad"):
        prepare_domain(folder, domain="d", out=tmp_path / "out")


def test_garbage_file_fails_early(tmp_path: Path) -> None:
    folder = source(tmp_path / "bad")
    (folder / "interactions.csv.gz").unlink()
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "u,a,never\n" * 50_000)
    with pytest.raises(UserError, match="1,000 of 1,000 records are bad, at most 5 may be"):
        prepare_domain(folder, domain="d", out=tmp_path / "out")


def test_few_unknown_items_are_quarantined(tmp_path: Path) -> None:
    folder = large(tmp_path / "bad", [b"user5,zebra,1", b"user6,zebra,1", b"user7,yak,1"], [5, 50, 500])
    report = prepare_domain(folder, domain="d", out=tmp_path / "out")
    assert [(r["key"], r["reason"].partition(" ")[0]) for r in quarantined(tmp_path)] == [("zebra", "2"), ("yak", "1")]
    assert report.notes["interactions dropped: item unknown"] == 3 and report.interactions == 1000


def test_bad_items_are_quarantined(tmp_path: Path) -> None:
    rows = [(f"u{n % 5}", f"i{n % 300}") for n in range(1500)]
    items: list[dict[str, Any]] = [{"item_id": f"i{n}"} for n in range(300)]
    items[9:9] = [{"item_id": "i3"}, {"item_id": None}, {"item_id": "z", "image": "../secret"}]
    report = prepared(tmp_path, rows=rows, items=items)
    assert [(r["line"], r["key"], r["reason"].partition(",")[0]) for r in quarantined(tmp_path)] == [
        (10, "i3", "item i3 occurs twice"),
        (11, None, "empty item_id"),
        (12, "z", "image path '../secret' leaves the folder of the items file"),
    ]
    assert report.items == 300 and report.interactions == 1500


# ----------------------------------------------------------------------------------------------------------- bad input


def test_unknown_item_is_refused_with_its_line_or_dropped(tmp_path: Path) -> None:
    rows = [*ROWS[:4], ("u", "zebra"), ("v", "zebra"), *ROWS[4:]]
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, rows=rows)
    assert caught.value.where == f"{tmp_path / 'source' / 'interactions.csv.gz'}:6"
    assert "item 'zebra' is not in the items file (2 interactions name an unknown item)" in str(caught.value)
    assert "--drop-unknown" in str(caught.value) and not (tmp_path / "out" / "d").exists()
    report = prepared(tmp_path, rows=rows, drop_unknown=True)
    assert report.notes["interactions dropped: item unknown"] == 2 and report.interactions == 6


def test_unknown_item_names_its_line_after_quarantined_lines(tmp_path: Path) -> None:
    folder = large(tmp_path / "bad", [b"user5,a", *(b"user5,zebra,1" for _ in range(7))], [5, *range(50, 57)])
    with pytest.raises(UserError) as caught:
        prepare_domain(folder, domain="d", out=tmp_path / "out")
    assert caught.value.where == f"{folder / 'interactions.csv'}:52"
    assert "item 'zebra' is not in the items file (7 interactions name an unknown item)" in str(caught.value)


def test_domain_emptied_by_k_core(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"d: the 5-core is empty: .* Use a smaller k-core or none"):
        prepared(tmp_path, k_core=5)
    with pytest.raises(UserError, match="no user has three interactions or more"):
        prepared(tmp_path, rows=ROWS[:2])


def test_existing_domain_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    prepared(tmp_path)
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        prepare_domain(tmp_path / "nowhere", domain="d", out=tmp_path / "out")
    assert prepared(tmp_path, overwrite=True).users == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": "../d"}, "'../d' is not a valid domain name"),
        ({"format": "spss"}, "unknown format 'spss'"),
        ({"k_core": 0}, "--k-core: is 0"),
        ({"max_sequence": 2}, "--max-sequence: is 2, must be at least 3"),
        ({"block_users": 0}, "block_users: must be positive, not 0"),
        ({"images": "x"}, "--images: works with --format amazon only"),
        ({"columns": {"user_id": "x"}, "format": "amazon"}, "--column: works with --format tabular only"),
    ],
)
def test_invalid_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare_domain(source(tmp_path / "source"), **{"domain": "d", "out": tmp_path / "out", **options})
    assert message in str(caught.value)


def test_source_folder_must_hold_one_file_of_each(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    (folder / "items.csv").write_text("item_id\na\n")
    with pytest.raises(UserError, match=r"expected one file items\.\*, found 2 \(items\.csv, items\.jsonl\)"):
        prepare_domain(folder, domain="d", out=tmp_path / "out")
    report = prepare_domain(folder, domain="d", out=tmp_path / "out", items=folder / "items.jsonl")
    assert report.items == 4
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        prepare_domain(tmp_path / "nowhere", domain="e", out=tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------- real data

TABLE = {
    "movies": (943, 1349, 99287),
    "retail": (4074, 3145, 264510),
    "books": (14391, 5961, 134793),
    "sports": (35598, 18357, 296337),
    "scientific": (8442, 4385, 59384),
    "fashion": (901, 2423, 14692),
}


@pytest.mark.parametrize("name", TABLE)
def test_real_domains_have_the_published_counts(shared_data: Path, tmp_path: Path, name: str) -> None:
    report = prepare_domain(shared_data / name, domain=name, out=tmp_path)
    assert (report.users, report.items, report.interactions) == TABLE[name]
    assert report.notes == {}
