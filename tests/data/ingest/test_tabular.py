"""The format `tabular`: equal results from every kind of file, and faults named with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from antdist.data.ingest.readers.base import SourceData
from antdist.data.ingest.readers.tabular import read_tabular
from antdist.errors import UserError

INTERACTIONS = "user_id,item_id,timestamp\nu2,b,20\nu1,a,10\nu2,a,5\nu1,c,-3\n"
ITEMS = 'item_id,text,price\na,"Apples, red",1.5\nb,,\nc,Cherries,"$1,299.00"\n'


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(folder: Path, interactions: str = INTERACTIONS, items: str = ITEMS, **columns: str) -> SourceData:
    return read_tabular(write(folder / "interactions.csv", interactions), write(folder / "items.csv", items), columns)


def triples(source: SourceData) -> list[tuple[str, str, float]]:
    found = source.interactions
    users, items = found.user_ids.to_pylist(), found.item_ids.to_pylist()
    return [(users[u], items[i], t) for u, i, t in zip(found.users, found.items, found.times.tolist(), strict=True)]


EXPECTED = [("u2", "b", 20), ("u1", "a", 10), ("u2", "a", 5), ("u1", "c", -3)]


def as_json(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_rows() -> list[dict[str, Any]]:
    return [{"user_id": u, "item_id": i, "timestamp": t} for u, i, t in EXPECTED]


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.tsv", "x.jsonl", "x.jsonl.gz", "x.parquet", "oddly_named"])
def test_interactions_are_equal_in_every_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if "json" in name:
        write(path, as_json(as_rows()))
    elif "parquet" in name:
        pq.write_table(pa.Table.from_pylist(as_rows()), path)
    else:
        write(path, INTERACTIONS.replace(",", "\t") if "tsv" in name else INTERACTIONS)
    source = read_tabular(path, write(tmp_path / "items.csv", ITEMS))
    assert triples(source) == EXPECTED
    assert source.interactions.user_ids.to_pylist() == ["u2", "u1"]  # order of first appearance
    assert source.interactions.item_ids.to_pylist() == ["b", "a", "c"]


def test_codes_are_in_order_of_appearance_across_blocks(tmp_path: Path) -> None:
    import random

    names = [f"user-{n:06d}" for n in range(5000)]
    drawn = random.Random(0).choices(names, k=700_000)  # about 20 MB: several blocks
    lines = ["user_id,item_id,timestamp", *(f"{user},a,{n}" for n, user in enumerate(drawn))]
    source = read(tmp_path, "\n".join(lines) + "\n", "item_id\na\n")
    assert source.interactions.user_ids.to_pylist() == list(dict.fromkeys(drawn))
    codes = {user: code for code, user in enumerate(dict.fromkeys(drawn))}
    assert source.interactions.users.tolist() == [codes[user] for user in drawn]
    assert source.interactions.times.tolist() == list(range(700_000))


@pytest.mark.parametrize("name", ["items.csv", "items.jsonl.gz", "items.parquet"])
def test_items_are_equal_in_every_format(tmp_path: Path, name: str) -> None:
    rows = [
        {"item_id": "a", "text": "Apples, red", "price": "1.5"},
        {"item_id": "b", "text": None, "price": None},
        {"item_id": "c", "text": "Cherries", "price": "$1,299.00"},
    ]
    if "parquet" in name:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        write(tmp_path / name, as_json(rows) if "json" in name else ITEMS)
    items = read_tabular(write(tmp_path / "interactions.csv", INTERACTIONS), tmp_path / name).items
    assert [(i.item_id, i.text, i.price) for i in items] == [
        ("a", "Apples, red", 1.5),
        ("b", None, None),
        ("c", "Cherries", 1299.0),
    ]


def test_integer_ids_and_fractional_times(tmp_path: Path) -> None:
    rows = [{"user_id": 7, "item_id": 1, "timestamp": 3}, {"user_id": 7, "item_id": 2, "timestamp": 3.5}]
    interactions = write(tmp_path / "interactions.jsonl", as_json(rows))
    source = read_tabular(interactions, write(tmp_path / "items.jsonl", as_json([{"item_id": 1}, {"item_id": 2}])))
    assert triples(source) == [("7", "1", 3), ("7", "2", 3.5)]
    assert [item.item_id for item in source.items] == ["1", "2"]


def test_large_times_stay_exact(tmp_path: Path) -> None:
    big = 2**60 + 1
    source = read(tmp_path, f"user_id,item_id,timestamp\nu,a,{big}\n")
    assert source.interactions.times.tolist() == [big]


def test_columns_can_be_named(tmp_path: Path) -> None:
    interactions = INTERACTIONS.replace("user_id", "customer").replace("timestamp", "at")
    items = "item_id,name\na,Apples\nb,Bread\nc,\n"
    source = read(tmp_path, interactions, items, user_id="customer", timestamp="at", text="name")
    assert triples(source) == EXPECTED
    assert [item.text for item in source.items] == ["Apples", "Bread", None]


def test_text_is_composed_of_title_category_and_brand(tmp_path: Path) -> None:
    rows = [
        {"item_id": "a", "title": "Mug &amp; <b>lid</b>", "category": ["Home", "Kitchen", "Home"], "brand": " Acme\n"},
        {"item_id": "b", "title": "", "category": "Garden", "brand": None},
        {"item_id": "c"},
    ]
    items = write(tmp_path / "items.jsonl", as_json(rows))
    source = read_tabular(write(tmp_path / "interactions.csv", INTERACTIONS), items)
    assert [item.text for item in source.items] == ["Mug & lid. Home Kitchen. Acme", "Garden", None]


def test_images_one_or_several(tmp_path: Path) -> None:
    rows = [
        {"item_id": "a", "image": "x.jpg"},
        {"item_id": "b", "image": ["x.jpg", "sub/y.png"]},
        {"item_id": "c", "image": "1|2 | 3|4|5"},
        {"item_id": "d", "image": "https://example.org/x.jpg"},
    ]
    items = write(tmp_path / "items.jsonl", as_json(rows))
    source = read_tabular(write(tmp_path / "interactions.csv", INTERACTIONS), items)
    assert [[str(p.relative_to(tmp_path)) for p in item.images] for item in source.items] == [
        ["x.jpg"],
        ["x.jpg", "sub/y.png"],
        ["1", "2", "3", "4"],
        [],
    ]
    assert source.tally.counts == {
        "images left out: more than 4 of an item": 1,
        "images left out: an address, nothing is downloaded": 1,
    }


# ---------------------------------------------------------------------------------------------------------- bad input

HEAD = "user_id,item_id,timestamp\n"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (HEAD + "u,a,1\nu,b\nu,a,2\n", 3, "too few columns: 2, the header has 3. Fix the row"),
        (HEAD + "u,a,1\n\nu,b,2,3\n", 4, "too many columns: 4, the header has 3"),
        (HEAD + "u,a,1\nu,b,yesterday\n", 3, "timestamp 'yesterday' is not a number"),
        (HEAD + "u,a,1\nu,b,\n", 3, "timestamp '' is not a number"),
        (HEAD + "u,a,nan\n", 2, "timestamp 'nan' is NaN, Inf or too large"),
        (HEAD + "u,a,1\nu,,2\n", 3, "empty item_id"),
        (HEAD + "u,a,1\n  ,a,2\n", 3, "empty user_id"),
        (HEAD + '"u\nv",a,1\nu,a,x\n', 4, "timestamp 'x' is not a number"),
    ],
)
def test_faulty_interaction_names_its_line(tmp_path: Path, content: str, line: int, message: str) -> None:
    for name in ("interactions.csv", "interactions.csv.gz"):
        path = write(tmp_path / name, content)
        with pytest.raises(UserError) as caught:
            read_tabular(path, write(tmp_path / "items.csv", ITEMS))
        assert caught.value.where == f"{path}:{line}" and message in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        (['{"user_id": "u", "item_id": "a", "timestamp": 1}', '{"user_id": "u"'], 2, "is not JSON"),
        (['{"user_id": "u", "item_id": "a", "timestamp": 1}', '{"user_id": "u", "timestamp": 1}'], 2, "empty item_id"),
        (
            ['{"user_id": "u", "item_id": "a", "timestamp": 1}', "", '{"user_id": "u", "item_id": "a"}'],
            3,
            "timestamp None",
        ),
        (['{"user_id": "u", "item_id": "a", "timestamp": true}'], 1, "timestamp True is not a number"),
        (
            ['{"user_id": "u", "item_id": "a", "timestamp": 1}', '{"user_id": 5, "item_id": "a", "timestamp": 1}'],
            2,
            "user_id is 5, but 'u' in the first line",
        ),
        (['{"user_id": "u", "item_id": 1.5, "timestamp": 1}'], 1, "item_id is 1.5, expected text or an integer"),
    ],
)
def test_faulty_json_interaction_names_its_line(tmp_path: Path, lines: list[str], line: int, message: str) -> None:
    path = write(tmp_path / "interactions.jsonl", "\n".join(lines))
    with pytest.raises(UserError) as caught:
        read_tabular(path, write(tmp_path / "items.csv", ITEMS))
    assert caught.value.where == f"{path}:{line}" and message in str(caught.value)


def test_faulty_parquet_row_is_named(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "item_id": "a", "timestamp": 1}, {"user_id": "u", "item_id": None, "timestamp": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "interactions.parquet")
    with pytest.raises(UserError, match=r"interactions\.parquet:2: empty item_id"):
        read_tabular(tmp_path / "interactions.parquet", write(tmp_path / "items.csv", ITEMS))


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("item_id,text\na,x\nb,y\na,z\n", 4, "item a occurs twice, first in line 2. Keep one"),
        ("item_id,text\na,x\n,y\n", 3, "empty item_id"),
        ("item_id,text\na,x\nb\n", 3, "too few columns: 1, the header has 2"),
        ('item_id,text\na,"two\nlines"\nb\n', 4, "too few columns"),
        ("item_id,image\na,../secret.jpg\n", 2, "image path '../secret.jpg' leaves the folder"),
        ("item_id,image\na,/etc/passwd\n", 2, "image path '/etc/passwd' leaves the folder"),
    ],
)
def test_faulty_item_names_its_line(tmp_path: Path, content: str, line: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, items=content)
    assert caught.value.where == f"{tmp_path / 'items.csv'}:{line}" and message in str(caught.value)


def test_image_symlink_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    write(tmp_path / "secret.jpg", b"x")
    (folder / "x.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(UserError, match=r"image path 'x\.jpg' leaves the folder"):
        read(folder, items="item_id,image\na,x.jpg\n")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv: no such file\. Check the path"):
        read_tabular(tmp_path / "nowhere.csv", write(tmp_path / "items.csv", ITEMS))
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        read_tabular(write(tmp_path / "interactions.csv", INTERACTIONS), tmp_path / "nowhere.jsonl")


def test_named_gz_but_not_gzip(tmp_path: Path) -> None:
    path = tmp_path / "interactions.csv.gz"
    path.write_text(INTERACTIONS)
    with pytest.raises(UserError, match=r"interactions\.csv\.gz: is named \.gz but is not gzip\. Rename the file"):
        read_tabular(path, write(tmp_path / "items.csv", ITEMS))


@pytest.mark.parametrize("cut", ["interactions", "items"])
def test_truncated_gzip_is_refused(tmp_path: Path, cut: str) -> None:
    paths = {
        "interactions": write(tmp_path / "interactions.csv.gz", HEAD + "".join(f"u{n},a,{n}\n" for n in range(9999))),
        "items": write(tmp_path / "items.csv.gz", "item_id\n" + "".join(f"i{n * n}\n" for n in range(9999))),
    }
    data = paths[cut].read_bytes()
    paths[cut].write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"{cut}\.csv\.gz: the gzip file is truncated or damaged"):
        read_tabular(paths["interactions"], paths["items"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user,item_id,timestamp\nu,a,1\n", "has no column 'user_id'; its columns are user, item_id, timestamp"),
        (HEAD, "contains no interactions"),
        ("", "is empty"),
        ("user_id,user_id,item_id,timestamp\nu,v,a,1\n", "two columns are named 'user_id'"),
        ("[{}]", "is a JSON array. Write JSON lines"),
    ],
)
def test_file_of_the_wrong_format(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert message in str(caught.value) and "interactions.csv" in str(caught.value)


def test_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "items.csv", "item_id,text\na,Käse\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"items\.csv:2: is not UTF-8 text.*Convert the file"):
        read_tabular(write(tmp_path / "interactions.csv", INTERACTIONS), path)


def test_column_options_that_name_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown column 'colour'"):
        read(tmp_path, colour="x")
    with pytest.raises(UserError, match=r"items\.csv: no row has a column name"):
        read(tmp_path, text="name")
