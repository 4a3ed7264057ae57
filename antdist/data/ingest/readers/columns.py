"""Interactions out of CSV, JSON lines or Parquet: columnar and parallel; after a fault a slow second pass, line by line,
sets the bad lines aside.

Arrow parses blocks into dictionaries of ids at once, so ten million rows never exist as ten million strings.
"""

from __future__ import annotations

import re
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antdist.data.ingest.readers.base import Interactions
from antdist.data.ingest.readers.files import (
    Row,
    check_file,
    detect_kind,
    is_gzip,
    is_valid_text,
    open_parquet,
    read_csv_header,
    read_first_object,
    read_rows,
)
from antdist.data.quarantine import Quarantine
from antdist.errors import UserError

BLOCK_BYTES = 8 << 20  # a JSON line may be no longer
ROLES = ("user_id", "item_id", "timestamp")
NUMBER = re.compile(r"\s*[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\s*", re.ASCII)
LONGEST_NUMBER = 400  # characters
REMEDY = "mend the line, or delete it"


def read_interactions(path: Path, names: dict[str, str], quarantine: Quarantine | None = None) -> Interactions:
    """Read interactions in input order.

    Args:
        path: CSV (comma or tab), JSON lines or Parquet; gzip or not.
        names: the column of each of `user_id`, `item_id`, `timestamp`.
        quarantine: takes bad lines; None: the first one is refused.

    Raises:
        UserError: naming the file, and the line where there is one.
    """
    import pyarrow as pa

    check_file(path)
    kind = detect_kind(path)
    try:
        table = {"csv": _read_csv, "jsonl": _read_json, "parquet": _read_parquet}[kind](path, names)
        users, user_ids = _codes(table[names["user_id"]])
        items, item_ids = _codes(table[names["item_id"]])
        times = _times(table[names["timestamp"]])
    except (pa.ArrowException, OSError) as error:
        users, items, times, user_ids, item_ids = _read_slowly(path, names, quarantine or Quarantine(), error)
    if not len(users):
        raise UserError("holds no interactions", where=path)
    return Interactions(users, items, times, user_ids, item_ids, lambda item: _find(path, names["item_id"], item), path)


def match_columns(path: Path, present: list[str], wanted: dict[str, str]) -> dict[str, str]:
    """The file's column for each role: the one the user named, else the one named as the role.

    Raises:
        UserError: a role has no column; the message lists the columns there are.
    """
    chosen = {}
    for role, name in wanted.items():
        if name not in present and role not in present:
            what = f"has no column {name!r}; its columns are {', '.join(present)}"
            raise UserError(what, where=path, remedy=f"name the column with --column {role}=COLUMN")
        chosen[role] = name if name in present else role
    return chosen


def read_column_names(path: Path) -> list[str]:
    """Column names of a file; of JSON lines, the keys of the first object."""
    import pyarrow.parquet as pq

    kind = detect_kind(path)
    if kind == "csv":
        return read_csv_header(path)[0]
    if kind == "jsonl":
        return list(read_first_object(path))
    with open_parquet(path) as file:
        return list(pq.read_schema(file).names)


# ----------------------------------------------------------------------------------------------------- the fast pass


def _read_csv(path: Path, names: dict[str, str]) -> Any:
    import pyarrow as pa
    import pyarrow.csv as pa_csv

    identifier = pa.dictionary(pa.int32(), pa.string())
    mark = read_csv_header(path)[1]

    def parse(time_type: Any) -> Any:
        convert = pa_csv.ConvertOptions(
            column_types={names["user_id"]: identifier, names["item_id"]: identifier, names["timestamp"]: time_type},
            include_columns=list(names.values()),
            null_values=[],
            strings_can_be_null=False,
        )
        options = {"parse_options": pa_csv.ParseOptions(delimiter=mark), "convert_options": convert}
        with _input(path) as stream:
            return pa_csv.read_csv(stream, pa_csv.ReadOptions(block_size=BLOCK_BYTES), **options)

    with suppress(pa.ArrowInvalid):
        return parse(pa.int64())
    return parse(pa.float64())


def _read_json(path: Path, names: dict[str, str]) -> Any:
    import pyarrow as pa
    import pyarrow.json as pa_json

    first = read_first_object(path)

    def parse(time_type: Any) -> Any:
        identifiers = {name: pa.int64() if type(first.get(name)) is int else pa.string() for name in names.values()}
        schema = pa.schema({**identifiers, names["timestamp"]: time_type})
        options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        with _input(path) as stream:
            return pa_json.read_json(stream, pa_json.ReadOptions(block_size=BLOCK_BYTES), options)

    if isinstance(first.get(names["timestamp"]), str):
        return parse(pa.string())
    with suppress(pa.ArrowInvalid):
        return parse(pa.int64())
    return parse(pa.float64())


def _read_parquet(path: Path, names: dict[str, str]) -> Any:
    import pyarrow.parquet as pq

    with open_parquet(path) as file:
        return pq.read_table(file, columns=list(names.values()))


def _input(path: Path) -> Any:
    import pyarrow as pa

    return pa.input_stream(str(path), compression="gzip" if is_gzip(path) else None)


def _codes(column: Any) -> tuple[NDArray[np.int32], Any]:
    """A column of ids as codes in order of first appearance, and the ids as text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_floating(column.type) or pa.types.is_boolean(column.type) or pa.types.is_nested(column.type):
        raise pa.ArrowInvalid(f"ids are {column.type}, text or whole numbers were due")
    if not pa.types.is_dictionary(column.type) or not pa.types.is_string(column.type.value_type):
        column = pc.dictionary_encode(column.cast(pa.string()))
    column = column.unify_dictionaries()
    if column.null_count:
        raise pa.ArrowInvalid("an id is missing")
    codes = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in column.chunks]
    if not codes:
        return np.zeros(0, np.int32), pa.array([], pa.string())
    ids = column.chunk(0).dictionary
    ids.validate(full=True)  # JSON and Parquet may hold what is no UTF-8
    if pc.any(pc.equal(pc.utf8_trim_whitespace(ids), "")).as_py():
        raise pa.ArrowInvalid("an id is empty")
    return np.concatenate(codes).astype(np.int32, copy=False), ids


def _times(column: Any) -> NDArray[Any]:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_date32(kind):
        column = column.cast(pa.int32()).cast(pa.int64())
    elif pa.types.is_temporal(kind) or pa.types.is_integer(kind):
        column = column.cast(pa.int64())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid:
            column = column.cast(pa.float64())
    elif not pa.types.is_floating(kind):
        raise pa.ArrowInvalid(f"timestamps are {kind}, numbers were due")
    if column.null_count:
        raise pa.ArrowInvalid("a timestamp is missing")
    times = column.to_numpy()
    if times.dtype.kind == "f" and not (np.abs(times) < 2.0**63).all():
        raise pa.ArrowInvalid("a timestamp is not finite, or too large")
    return times


# ----------------------------------------------------------------------------------------------------- the slow pass


def _read_slowly(path: Path, names: dict[str, str], quarantine: Quarantine, error: Exception) -> tuple[Any, ...]:
    """Line by line what Arrow refused as a whole, bad lines set aside: users, items, times, and the ids of both."""
    import pyarrow as pa

    bad = quarantine.inspect(path)
    user_at: dict[str, int] = {}
    item_at: dict[str, int] = {}
    users, items = array("i"), array("i")
    times: Any = array("q")  # and doubles, once there is a fraction
    first: Row = {}
    for line, row in read_rows(path, bad):
        fault = _fault(row, names) or (_mixture(row, first, names) if first else None)
        if fault:
            bad.add(UserError(fault, where=f"{path}:{line}", remedy=REMEDY), line)
            continue
        time = _number(row[names["timestamp"]])
        if time is None:  # a date: no line is to blame
            raise UserError(f"cannot be read: {str(error).splitlines()[0]}", where=path) from None
        first = first or row
        bad.good += 1
        if isinstance(time, float) and times.typecode == "q":
            times = array("d", times)
        user, item = (str(row[names[role]]) for role in ("user_id", "item_id"))
        users.append(user_at.setdefault(user, len(user_at)))
        items.append(item_at.setdefault(item, len(item_at)))
        times.append(time)
    bad.close()
    ids = (pa.array(list(at), pa.string()) for at in (user_at, item_at))
    return np.array(users, np.int32), np.array(items, np.int32), np.array(times), *ids


def _number(value: Any) -> int | float | None:
    if isinstance(value, str):
        return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    return value if isinstance(value, int | float) else None


def _fault(row: Row, names: dict[str, str]) -> str | None:
    for role in ("user_id", "item_id"):
        value = row.get(names[role])
        if value is None or (isinstance(value, str) and not value.strip()):
            return f"empty {role}"
        if not isinstance(value, str | int) or isinstance(value, bool):
            return f"{role} is {_shown(value)}, text or a whole number was due"
        if isinstance(value, str) and not is_valid_text(value):
            return f"{role} {_shown(value)} is no text that UTF-8 can hold"
    value = row.get(names["timestamp"])
    if isinstance(value, bool | list | dict | bytes | type(None)):
        return f"timestamp {_shown(value)} is no number"
    if isinstance(value, str) and (len(value) > LONGEST_NUMBER or not NUMBER.fullmatch(value)):
        known = value.strip().lower().lstrip("+-") in ("nan", "inf", "infinity")
        return f"timestamp {_shown(value)} is {'not finite, or too large' if known else 'no number'}"
    number = _number(value)
    if number is None:
        return None  # a date: Parquet has them, and Arrow reads them
    small_enough = -(2**63) <= number < 2**63
    return None if small_enough else f"timestamp {_shown(value)} is not finite, or too large"


def _shown(value: Any) -> str:
    """A value in a message: not the whole of a page."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _mixture(row: Row, first: Row, names: dict[str, str]) -> str | None:
    """JSON may mix text and numbers in a column; a column of ids or times may not."""
    for role, name in names.items():
        if isinstance(row[name], str) != isinstance(first[name], str):
            return f"{role} is {row[name]!r}, but {first[name]!r} in the first line: text and numbers are mixed"
    return None


def _find(path: Path, column: str, item_id: str) -> str:
    lenient = Quarantine(1.0).inspect(path)  # bad lines before it were set aside, and are not what is asked for
    line = next((line for line, row in read_rows(path, lenient) if str(row.get(column)) == item_id), None)
    return str(path) if line is None else f"{path}:{line}"
