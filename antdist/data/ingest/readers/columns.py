"""Read interactions from CSV, JSON lines or Parquet: in parallel; after a fault line by line.

Arrow parses blocks directly into dictionaries of ids, so ten million rows never exist as ten million strings. If it
refuses a file, a slow second pass reads each line and quarantines the bad ones.
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

BLOCK_BYTES = 8 << 20  # also the longest JSON line
ROLES = ("user_id", "item_id", "timestamp")
NUMBER = re.compile(r"\s*[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\s*", re.ASCII)
LONGEST_NUMBER = 400  # characters
REMEDY = "fix or delete the line"


def read_interactions(path: Path, names: dict[str, str], quarantine: Quarantine | None = None) -> Interactions:
    """Read interactions in input order.

    Args:
        path: CSV (comma or tab), JSON lines or Parquet; gzip or not.
        names: the column of each of `user_id`, `item_id`, `timestamp`.
        quarantine: takes bad lines; None: the first one is refused.

    Raises:
        UserError: naming the file, and the line if there is one.
    """
    import pyarrow as pa

    check_file(path)
    kind = detect_kind(path)
    try:
        table = {"csv": _read_csv, "jsonl": _read_json, "parquet": _read_parquet}[kind](path, names)
        users, user_ids = _encode_ids(table[names["user_id"]])
        items, item_ids = _encode_ids(table[names["item_id"]])
        times = _parse_times(table[names["timestamp"]])
    except (pa.ArrowException, OSError) as error:
        users, items, times, user_ids, item_ids = _read_slowly(path, names, quarantine or Quarantine(), error)
    if not len(users):
        raise UserError("contains no interactions", where=path, remedy="check that this is the right file")
    return Interactions(
        users, items, times, user_ids, item_ids, lambda item: _locate_item(path, names["item_id"], item), path
    )


def match_columns(path: Path, present: list[str], wanted: dict[str, str]) -> dict[str, str]:
    """Match each role with a column: the one that the user named, else the one named like the role.

    Args:
        present: the file's columns.
        wanted: the column of each role, by the user or by default.

    Raises:
        UserError: a role has no column.
    """
    chosen = {}
    for role, name in wanted.items():
        if name not in present and role not in present:
            what = f"has no column {name!r}; its columns are {', '.join(present)}"
            raise UserError(what, where=path, remedy=f"name the column with --column {role}=COLUMN")
        chosen[role] = name if name in present else role
    return chosen


def read_column_names(path: Path) -> list[str]:
    """Read the column names of a file; of JSON lines the keys of the first object."""
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


def _encode_ids(column: Any) -> tuple[NDArray[np.int32], Any]:
    """Encode a column of ids as codes (T,) in order of first appearance, and the ids as strings."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_floating(column.type) or pa.types.is_boolean(column.type) or pa.types.is_nested(column.type):
        raise pa.ArrowInvalid(f"ids are {column.type}, expected text or integers")
    if not pa.types.is_dictionary(column.type) or not pa.types.is_string(column.type.value_type):
        column = pc.dictionary_encode(column.cast(pa.string()))
    column = column.unify_dictionaries()
    if column.null_count:
        raise pa.ArrowInvalid("an id is missing")
    codes = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in column.chunks]
    if not codes:
        return np.zeros(0, np.int32), pa.array([], pa.string())
    ids = column.chunk(0).dictionary
    ids.validate(full=True)  # JSON and Parquet may contain invalid UTF-8
    if pc.any(pc.equal(pc.utf8_trim_whitespace(ids), "")).as_py():
        raise pa.ArrowInvalid("an id is empty")
    return np.concatenate(codes).astype(np.int32, copy=False), ids


def _parse_times(column: Any) -> NDArray[Any]:
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
        raise pa.ArrowInvalid(f"timestamps are {kind}, expected numbers")
    if column.null_count:
        raise pa.ArrowInvalid("a timestamp is missing")
    times = column.to_numpy()
    if times.dtype.kind == "f" and not (np.abs(times) < 2.0**63).all():
        raise pa.ArrowInvalid("a timestamp is NaN, Inf or too large")
    return times


# ----------------------------------------------------------------------------------------------------- the slow pass


def _read_slowly(path: Path, names: dict[str, str], quarantine: Quarantine, error: Exception) -> tuple[Any, ...]:
    """Read a file that Arrow refused line by line, quarantining bad lines.

    Returns users, items, times, user ids and item ids.
    """
    import pyarrow as pa

    bad = quarantine.inspect(path)
    user_at: dict[str, int] = {}
    item_at: dict[str, int] = {}
    users, items = array("i"), array("i")
    times: Any = array("q")  # doubles from the first fraction on
    first: Row = {}
    for line, row in read_rows(path, bad):
        fault = _find_fault(row, names) or (_find_mixed_types(row, first, names) if first else None)
        if fault:
            bad.add(UserError(fault, where=f"{path}:{line}", remedy=REMEDY), line)
            continue
        time = _parse_number(row[names["timestamp"]])
        if time is None:  # a date: the fault is not in a line
            what = f"cannot be read: {str(error).splitlines()[0]}"
            raise UserError(what, where=path, remedy="write the file again, with numbers as timestamps") from None
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


def _parse_number(value: Any) -> int | float | None:
    if isinstance(value, str):
        return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    return value if isinstance(value, int | float) else None


def _find_fault(row: Row, names: dict[str, str]) -> str | None:
    for role in ("user_id", "item_id"):
        value = row.get(names[role])
        if value is None or (isinstance(value, str) and not value.strip()):
            return f"empty {role}"
        if not isinstance(value, str | int) or isinstance(value, bool):
            return f"{role} is {_shorten(value)}, expected text or an integer"
        if isinstance(value, str) and not is_valid_text(value):
            return f"{role} {_shorten(value)} is not valid UTF-8"
    value = row.get(names["timestamp"])
    if isinstance(value, bool | list | dict | bytes | type(None)):
        return f"timestamp {_shorten(value)} is not a number"
    if isinstance(value, str) and (len(value) > LONGEST_NUMBER or not NUMBER.fullmatch(value)):
        known = value.strip().lower().lstrip("+-") in ("nan", "inf", "infinity")
        return f"timestamp {_shorten(value)} is {'NaN, Inf or too large' if known else 'not a number'}"
    number = _parse_number(value)
    if number is None:
        return None  # a date in Parquet, which Arrow reads
    small_enough = -(2**63) <= number < 2**63
    return None if small_enough else f"timestamp {_shorten(value)} is NaN, Inf or too large"


def _shorten(value: Any) -> str:
    """Represent a value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _find_mixed_types(row: Row, first: Row, names: dict[str, str]) -> str | None:
    """Describe a column that mixes text and numbers, which JSON allows, but ids and times must not."""
    for role, name in names.items():
        if isinstance(row[name], str) != isinstance(first[name], str):
            return f"{role} is {row[name]!r}, but {first[name]!r} in the first line: text and numbers are mixed"
    return None


def _locate_item(path: Path, column: str, item_id: str) -> str:
    lenient = Quarantine(1.0).inspect(path)  # skips bad lines, which have been quarantined
    line = next((line for line, row in read_rows(path, lenient) if str(row.get(column)) == item_id), None)
    return str(path) if line is None else f"{path}:{line}"
