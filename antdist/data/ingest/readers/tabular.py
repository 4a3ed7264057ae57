"""Read the format `tabular`: interactions and items, each CSV, JSON lines or Parquet, gzip or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from antdist.data.ingest.readers.base import MOST_IMAGES, Item, SourceData, Tally, compose_text, read_price, valid_text
from antdist.data.ingest.readers.columns import REMEDY, ROLES, match_columns, read_column_names, read_interactions
from antdist.data.ingest.readers.files import Row, check_file, read_rows
from antdist.data.quarantine import Quarantine
from antdist.errors import UserError

ITEM_ROLES = ("text", "title", "category", "brand", "price", "image")


def read_tabular(
    interactions: Path,
    items: Path | None,
    columns: Mapping[str, str] | None = None,
    quarantine: Quarantine | None = None,
) -> SourceData:
    """Read a domain from two tables.

    Args:
        interactions: columns `user_id`, `item_id`, `timestamp` (a number).
        items: columns `item_id` and optionally `text` (or `title`, `category`, `brand`), `price` and `image` (one or
            several paths, as a list or separated by `|`, relative to the file's folder). None: no items.
        columns: the file's name of a column where it differs, `{"user_id": "customer"}`.
        quarantine: takes bad lines; None: the first one is refused.

    Raises:
        UserError: naming file and line.
    """
    columns = dict(columns or {})
    known = (*ROLES, *ITEM_ROLES)
    for role in columns:
        if role not in known:
            raise UserError(f"unknown column {role!r}", where="--column", remedy=f"use one of {', '.join(known)}")
    if items is not None:
        check_file(items)
    check_file(interactions)
    names = match_columns(
        interactions, read_column_names(interactions), {role: columns.get(role, role) for role in ROLES}
    )
    tally, quarantine = Tally(), quarantine or Quarantine()
    found = read_interactions(interactions, names, quarantine)
    return SourceData(found, [] if items is None else read_items(items, columns, tally, quarantine), tally)


def read_items(path: Path, columns: Mapping[str, str], tally: Tally, quarantine: Quarantine) -> list[Item]:
    """Read the items in the order of their file.

    Args:
        quarantine: takes items whose id is empty or occurs twice, whose image path leaves the folder, or with a field of
            a wrong type.

    Raises:
        UserError: too many items are bad, there is none, or a column that the user named does not exist.
    """
    id_column = columns.get("item_id", "item_id")
    names = {role: columns.get(role, role) for role in ITEM_ROLES}
    unseen = {columns[role] for role in ITEM_ROLES if role in columns}
    seen: dict[str, int] = {}
    items: list[Item] = []
    folder = path.parent.resolve()
    bad = quarantine.inspect(path)
    for line, row in read_rows(path, bad):
        where = f"{path}:{line}"
        if not items and id_column not in row:
            id_column = match_columns(path, list(row), {"item_id": id_column})["item_id"]
        unseen -= row.keys()
        item_id = None
        try:
            item_id = _parse_id(row.get(id_column), where)
            if item_id in seen:
                what = f"item {item_id} occurs twice, first in line {seen[item_id]}"
                raise UserError(what, where=where, remedy="keep one of the two lines")
            text, images = (
                _make_text(row, names, where),
                _resolve_images(row.get(names["image"]), item_id, folder, where, tally),
            )
        except UserError as fault:
            bad.add(fault, line, item_id)
            continue
        bad.good += 1
        seen[item_id] = line
        items.append(Item(item_id, text, read_price(row.get(names["price"]), item_id, tally), images))
    bad.close()
    if unseen:
        raise UserError(f"no row has a column {' or '.join(sorted(unseen))}", where=path, remedy="check --column")
    if not items:
        raise UserError("contains no items", where=path, remedy="check that this is the right file")
    return items


def _parse_id(value: Any, where: str) -> str:
    if value is None or not str(value).strip():
        raise UserError("empty item_id", where=where, remedy="give the item an id, or delete the line")
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise UserError(f"item_id is {value!r}, expected text or an integer", where=where, remedy=REMEDY)
    return valid_text(str(value))


def _make_text(row: Row, names: Mapping[str, str], where: str) -> str | None:
    text = row.get(names["text"])
    if text is not None:
        if not isinstance(text, str):
            raise UserError(f"text is {text!r}, expected text", where=where, remedy=REMEDY)
        return valid_text(text).strip() or None
    title, category, brand = (row.get(names[role]) for role in ("title", "category", "brand"))
    categories = category if isinstance(category, list) else [category or ""]
    for value in (title, brand, *categories):
        if not isinstance(value, str | None):
            what = f"title, category and brand must be text, not {value!r}"
            raise UserError(what, where=where, remedy=REMEDY)
    return compose_text(title, categories, brand)


def _resolve_images(value: Any, item_id: str, folder: Path, where: str, tally: Tally) -> tuple[Path, ...]:
    names = value.split("|") if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"image is {value!r}, expected one or several paths", where=where, remedy=REMEDY)
    paths = []
    for name in (name.strip() for name in names):
        if not name:
            continue
        if name.startswith(("http://", "https://")):
            tally.add("images left out: an address, nothing is downloaded", example=f"{name} of item {item_id}")
            continue
        paths.append(resolve_inside(folder, name, where))
    tally.add(
        f"images left out: more than {MOST_IMAGES} of an item", max(len(paths) - MOST_IMAGES, 0), f"item {item_id}"
    )
    return tuple(paths[:MOST_IMAGES])


def resolve_inside(folder: Path, name: str, where: str) -> Path:
    """Resolve a path below a resolved folder. Raises UserError if it leads out of the folder."""
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError):
        raise UserError(f"image path {name!r} is not a path", where=where, remedy=REMEDY) from None
    if not path.is_relative_to(folder):
        remedy = f"keep images below {folder}"
        raise UserError(f"image path {name!r} leaves the folder of the items file", where=where, remedy=remedy)
    return path
