"""Read the format `atomic`: the files of RecBole and UniSRec, whose published split is kept.

A row is one prediction: a user, the history (at most the last 50 items) and the next item. The users' complete sequences
are reconstructed from the rows, then every row is checked against them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from antdist.data.ingest.readers.base import Interactions, Item, SourceData, Tally, valid_text
from antdist.data.ingest.readers.files import open_text
from antdist.errors import UserError

LONGEST_HISTORY = 50
PARTS = ("train", "valid", "test")
ROW_COLUMNS = ("user_id", "item_id_list", "item_id")
SAME_RELEASE = "use files of one publication"


@dataclass(frozen=True)
class _Row:
    line: int
    user: str
    history: str
    target: str


def read_atomic(folder: Path) -> SourceData:
    """Read `NAME.{train,valid,test}.inter`, `NAME.text` and optionally `NAME.item2index`; gzip or not.

    With an `.item2index` the rows name items by index, and it defines the order of the items; without one they name ids
    of the `.text` file. This format has no timestamps; positions in the sequence are used instead.

    Raises:
        UserError: naming file and line: a file is missing, an item is unknown, or a row contradicts the user's sequence
            or the leave-one-out split.
    """
    name = _find_domain_name(folder)
    paths = {part: _find_path(folder, f"{name}.{part}.inter") for part in PARTS}
    items, places = _read_items(folder, name)
    valid, test = ({row.user: row for row in _read_distinct_users(paths[part])} for part in ("valid", "test"))
    _check_same_users(valid, test, paths)
    sequences: dict[str, list[str]] = {}
    for user, rows in groupby(_read_prediction_rows(paths["train"]), key=lambda row: row.user):
        train = list(rows)
        where = f"{paths['train']}:{train[0].line}"
        if user in sequences:
            raise UserError(f"the rows of user {user} are not adjacent", where=where, remedy="sort the file by user")
        if user not in test:
            raise UserError(f"user {user} is not in {paths['test'].name}", where=where, remedy=SAME_RELEASE)
        sequences[user] = _rebuild_sequence(train, valid[user], test[user], places, paths)
    for user in test.keys() - sequences.keys():  # users with one training interaction have no training row
        sequences[user] = _rebuild_sequence([], valid[user], test[user], places, paths)
    return SourceData(
        _make_interactions({user: sequences[user] for user in test}, places, items, paths["test"]), items, Tally()
    )


# ---------------------------------------------------------------------------------------------------------- sequences


def _rebuild_sequence(
    train: list[_Row], valid: _Row, test: _Row, places: dict[str, int], paths: dict[str, Path]
) -> list[str]:
    """Reconstruct a user's sequence from its rows, and check every row, the shortest first.

    Training rows come longest first.
    """
    oldest = train[-1] if train else valid
    sequence = [oldest.history, *(row.target for row in reversed(train)), valid.target, test.target]
    parts = [*(("train", row) for row in reversed(train)), ("valid", valid), ("test", test)]
    for position, (part, row) in enumerate(parts, 1):
        history = sequence[max(0, position - LONGEST_HISTORY) : position]
        if " ".join(history) != row.history or (position == 1 and " " in row.history):
            what = f"the row of user {row.user} contradicts the user's shorter rows"
            remedy = f"write the last {LONGEST_HISTORY} items and the next one a row, and a user's rows longest first"
            raise UserError(what, where=f"{paths[part]}:{row.line}", remedy=remedy)
        for token in (row.target, sequence[0]):
            if token not in places:
                raise UserError(f"item {token!r} is unknown", where=f"{paths[part]}:{row.line}", remedy=SAME_RELEASE)
    return sequence


def _make_interactions(
    sequences: dict[str, list[str]], places: dict[str, int], items: list[Item], path: Path
) -> Interactions:
    import pyarrow as pa

    lengths = np.array([len(sequence) for sequence in sequences.values()])
    codes = (places[token] for sequence in sequences.values() for token in sequence)
    return Interactions(
        users=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        items=np.fromiter(codes, np.int32, int(lengths.sum())),
        times=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        user_ids=pa.array(list(sequences), pa.string()),
        item_ids=pa.array([item.item_id for item in items], pa.string()),
        find_item=lambda _: str(path),
        file=path,
    )


def _check_same_users(valid: dict[str, _Row], test: dict[str, _Row], paths: dict[str, Path]) -> None:
    for one, other, part, missing in ((valid, test, "valid", "test"), (test, valid, "test", "valid")):
        for user in one.keys() - other.keys():
            where = f"{paths[part]}:{one[user].line}"
            raise UserError(f"user {user} is not in {paths[missing].name}", where=where, remedy=SAME_RELEASE)


# -------------------------------------------------------------------------------------------------------------- files


def _find_domain_name(folder: Path) -> str:
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, remedy="give the folder that holds NAME.train.inter")
    names = sorted({path.name.partition(".train.inter")[0] for path in folder.glob("*.train.inter*")})
    if len(names) != 1:
        what = f"expected one file NAME.train.inter, found {len(names)}{': ' * bool(names)}{', '.join(names)}"
        raise UserError(what, where=folder, remedy="give a folder with the files of one domain")
    return names[0]


def _find_path(folder: Path, name: str) -> Path:
    """Return the file's path, or that of its `.gz` if only that exists."""
    packed = folder / f"{name}.gz"
    return packed if packed.is_file() and not (folder / name).is_file() else folder / name


def _read_distinct_users(path: Path) -> Iterator[_Row]:
    seen = set()
    for row in _read_prediction_rows(path):
        if row.user in seen:
            raise UserError(f"user {row.user} occurs twice", where=f"{path}:{row.line}", remedy=SAME_RELEASE)
        seen.add(row.user)
        yield row


def _read_prediction_rows(path: Path) -> Iterator[_Row]:
    for line, fields in _read_table(path, ROW_COLUMNS):
        yield _Row(line, *fields)


def _read_table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Read line numbers and the fields of `columns` of a tab-separated file with a header of `name:type`."""
    with open_text(path) as text:
        header = [field.partition(":")[0] for field in text.readline().rstrip("\r\n").split("\t")]
        missing = [column for column in columns if column not in header]
        if missing:
            what = f"has no column {missing[0]}; its columns are {', '.join(header)}"
            raise UserError(what, where=f"{path}:1", remedy="the first line must be NAME:TYPE, separated by tabs")
        places = [header.index(column) for column in columns]
        for line, content in enumerate(text, 2):
            if not content.strip():
                continue
            fields = content.rstrip("\r\n").split("\t")
            if len(fields) != len(header):
                fault = "few" if len(fields) < len(header) else "many"
                what = f"too {fault} columns: {len(fields)}, the header has {len(header)}"
                raise UserError(what, where=f"{path}:{line}", remedy="fix the row")
            yield line, [fields[place] for place in places]


def _read_items(folder: Path, name: str) -> tuple[list[Item], dict[str, int]]:
    """Read the items in order, and the index of each token that rows may name."""
    texts: dict[str, str] = {}
    path = _find_path(folder, f"{name}.text")
    for line, (item_id, text) in _read_table(path, ("item_id", "text")):
        if item_id in texts or not item_id:
            what = f"item {item_id} occurs twice" if item_id else "empty item_id"
            raise UserError(what, where=f"{path}:{line}", remedy="keep one line an item")
        texts[item_id] = valid_text(text).strip()
    index = _find_path(folder, f"{name}.item2index")
    if not index.is_file():
        return [Item(i, text or None, None) for i, text in texts.items()], {i: place for place, i in enumerate(texts)}
    order = _read_index(index)
    unknown = [item_id for item_id in texts if item_id not in order]
    if unknown:
        raise UserError(f"item {unknown[0]} is not in {index.name}", where=path, remedy=SAME_RELEASE)
    items = [Item(item_id, texts.get(item_id) or None, None) for item_id in order]
    return items, {token: place for place, token in enumerate(order.values())}


def _read_index(path: Path) -> dict[str, str]:
    """Read item ids and their indices, in the order of the index."""
    order: dict[str, int] = {}
    with open_text(path) as text:
        for line, content in enumerate(text, 1):
            item_id, _, index = content.rstrip("\r\n").partition("\t")
            if not item_id or item_id in order or not re.fullmatch("[0-9]{1,18}", index):
                what = f"{content.rstrip()!r} is not an item, a tab and its index, or occurs twice"
                raise UserError(what, where=f"{path}:{line}", remedy="fix the line")
            order[item_id] = int(index)
    if len(set(order.values())) != len(order):
        raise UserError("two items have the same index", where=path, remedy=SAME_RELEASE)
    return {item_id: str(index) for item_id, index in sorted(order.items(), key=lambda pair: pair[1])}
