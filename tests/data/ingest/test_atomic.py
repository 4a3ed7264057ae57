"""The format `atomic`: sequences are reconstructed from predictions, and every published row is checked."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from antdist.data.domain import open_domain
from antdist.data.ingest.prepare import prepare_domain
from antdist.errors import UserError

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
# User x is longer than a history, y is ordinary, z has no training row.
USERS = {"x": [n % 60 for n in range(130)], "y": [3, 3, 1, 2, 0], "z": [5, 6, 7]}


def row(user: str, position: int) -> str:
    items = USERS[user]
    return f"{user}\t{' '.join(map(str, items[max(0, position - 50) : position]))}\t{items[position]}\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    train = [row(user, at) for user, items in USERS.items() for at in range(len(items) - 3, 0, -1)]
    (tmp_path / "Tiny.train.inter").write_text(HEADER + "".join(train))
    (tmp_path / "Tiny.valid.inter").write_text(HEADER + "".join(row(u, len(i) - 2) for u, i in USERS.items()))
    test = HEADER + "".join(row(u, len(i) - 1) for u, i in USERS.items())
    (tmp_path / "Tiny.test.inter.gz").write_bytes(gzip.compress(test.encode()))
    (tmp_path / "Tiny.item2index").write_text("".join(f"asin{n}\t{n}\n" for n in reversed(range(60))))
    (tmp_path / "Tiny.text").write_text("item_id:token\ttext:token_seq\nasin7\tSeven. \nasin3\tThree\n")
    return tmp_path


def prepared(source: Path) -> tuple[dict[str, list[int]], list[str], list[str | None]]:
    prepare_domain(source, format="atomic", domain="tiny", out=source / "out")
    domain = open_domain(source / "out" / "tiny")
    sequences = domain.sequences()
    pairs = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    users = {user: sequences.items[a:b].tolist() for user, (a, b) in zip(domain.user_ids(), pairs, strict=True)}
    items = list(domain.items())
    return users, [item.item_id for item in items], [item.text for item in items]


def test_complete_sequences_are_reconstructed(source: Path) -> None:
    users, item_ids, texts = prepared(source)
    assert users == USERS and list(users) == ["x", "y", "z"]
    assert item_ids == [f"asin{n}" for n in range(60)]
    assert texts[7] == "Seven." and texts[3] == "Three" and texts[0] is None


def test_without_an_index_rows_name_items_by_id(source: Path) -> None:
    (source / "Tiny.item2index").unlink()
    text = "item_id:token\ttext:token_seq\n" + "".join(f"{n}\ttext {n}\n" for n in range(60))
    (source / "Tiny.text").write_text(text)
    users, item_ids, _ = prepared(source)
    assert users == USERS and item_ids[:2] == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "old", "new", "line", "message"),
    [
        ("Tiny.train.inter", "y\t3 3\t1", "y\t3 4\t1", 129, "the row of user y contradicts"),
        ("Tiny.train.inter", "y\t3 3\t1", "y\t3 3\t9", None, "the row of user y contradicts"),
        ("Tiny.train.inter", "y\t3\t3\n", "", 129, "the row of user y contradicts"),
        ("Tiny.valid.inter", "y\t3 3 1\t2", "y\t3 3 1\t4", None, "the row of user y contradicts"),
        ("Tiny.valid.inter", "z\t5\t6", "z\t5", 4, "too few columns: 2, the header has 3"),
        ("Tiny.valid.inter", "z\t5\t6\n", "", None, "user z is not in Tiny.valid.inter"),
        ("Tiny.valid.inter", "z\t5\t6\n", "z\t5\t6\nz\t5\t6\n", 5, "user z occurs twice"),
        ("Tiny.train.inter", "y\t3\t3\n", "y\t3\t3\nw\t3\t3\n", 131, "user w is not in Tiny.test.inter"),
        ("Tiny.train.inter", "y\t3\t3\n", "y\t3\t3\nx\t3\t3\n", 131, "the rows of user x are not adjacent"),
        ("Tiny.train.inter", "item_id:token\n", "item:token\n", 1, "has no column item_id; its columns are user_id"),
        ("Tiny.item2index", "asin5\t5\n", "", None, "item '5' is unknown"),
        ("Tiny.item2index", "asin5\t5\n", "asin5\tfive\n", 55, "'asin5\\tfive' is not an item"),
        ("Tiny.text", "asin3\tThree\n", "asin99\tThree\n", None, "item asin99 is not in Tiny.item2index"),
    ],
)
def test_fault_names_file_and_line(source: Path, name: str, old: str, new: str, line: int | None, message: str) -> None:
    text = (source / name).read_text()
    assert old in text
    (source / name).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        prepare_domain(source, format="atomic", domain="tiny", out=source / "out")
    assert message in str(caught.value)
    if line is not None:
        assert caught.value.where == f"{source / name}:{line}"
    assert not (source / "out").exists()


def test_published_split_is_not_filtered(source: Path) -> None:
    with pytest.raises(UserError, match=r"keeps its published split.*Leave out --k-core"):
        prepare_domain(source, format="atomic", domain="tiny", out=source / "out", k_core=5)


def test_missing_files(source: Path) -> None:
    (source / "Tiny.text").unlink()
    with pytest.raises(UserError, match=r"Tiny\.text: no such file"):
        prepare_domain(source, format="atomic", domain="tiny", out=source / "out")
    (source / "Tiny.train.inter").unlink()
    with pytest.raises(UserError, match=r"expected one file NAME\.train\.inter, found 0"):
        prepare_domain(source, format="atomic", domain="tiny", out=source / "out")


def test_real_publication_has_the_papers_counts(shared_data: Path, tmp_path: Path) -> None:
    report = prepare_domain(shared_data / "formats" / "atomic", format="atomic", domain="scientific", out=tmp_path)
    assert (report.users, report.items, report.interactions) == (8442, 4385, 59427)
    assert report.with_text == 4385
