"""Interactions out of CSV, JSON lines or Parquet: columnar and parallel; on a fault a slow second pass finds its line.

Arrow parses blocks into dictionaries of ids at once, so ten million rows never exist as ten million strings.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from antdist.data.readers.files import Row, check_file, csv_header, is_gzip, json_rows, open_parquet, rows, sniff
from antdist.data.readers.form import Interactions
from antdist.errors import UserError

BLOCK_BYTES = 8 << 20  # a JSON line may be no longer
ROLES = ("user_id", "item_id", "timestamp")
REMEDY = "mend the line, or delete it"


def read_interactions(path: Path, names: dict[str, str]) -> Interactions:
    """Read interactions in input order.

    Args:
        path: CSV (comma or tab), JSON lines or Parquet; gzip or not.
        names: the column of each of `user_id`, `item_id`, `timestamp`.

    Raises:
        UserError: naming the file, and the line where there is one.
    """
    import pyarrow as pa

    check_file(path)
    kind = sniff(path)
    try:
        table = {"csv": _read_csv, "jsonl": _read_json, "parquet": _read_parquet}[kind](path, names)
        users, user_ids = _codes(table[names["user_id"]])
        items, item_ids = _codes(table[names["item_id"]])
        times = _times(table[names["timestamp"]])
    except (pa.ArrowException, OSError) as error:
        _tell_fault(path, names, error)
    if not len(users):
        raise UserError("holds no interactions", where=path)
    return Interactions(users, items, times, user_ids, item_ids, lambda item: _find(path, names["item_id"], item))


def choose_columns(path: Path, present: list[str], wanted: dict[str, str]) -> dict[str, str]:
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


def present_columns(path: Path) -> list[str]:
    """Column names of a file; of JSON lines, the keys of the first object."""
    import pyarrow.parquet as pq

    kind = sniff(path)
    if kind == "csv":
        return csv_header(path)[0]
    if kind == "jsonl":
        return list(next(json_rows(path))[1])
    with open_parquet(path) as file:
        return list(pq.read_schema(file).names)


# ----------------------------------------------------------------------------------------------------- the fast pass


def _read_csv(path: Path, names: dict[str, str]) -> Any:
    import pyarrow as pa
    import pyarrow.csv as pa_csv

    identifier = pa.dictionary(pa.int32(), pa.string())
    mark = csv_header(path)[1]

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

    first = next(json_rows(path))[1]

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


def _tell_fault(path: Path, names: dict[str, str], error: Exception) -> NoReturn:
    """Find the first faulty line and tell it; if no line is to blame, tell what Arrow said."""
    first: Row = {}
    for line, row in rows(path):
        first = first or row
        fault = _fault(row, names) or _mixture(row, first, names)
        if fault:
            raise UserError(fault, where=f"{path}:{line}", remedy=REMEDY) from None
    raise UserError(f"cannot be read: {str(error).splitlines()[0]}", where=path) from None


def _fault(row: Row, names: dict[str, str]) -> str | None:
    for role in ("user_id", "item_id"):
        value = row.get(names[role])
        if value is None or not str(value).strip():
            return f"empty {role}"
        if isinstance(value, bool | float | list | dict):
            return f"{role} is {value!r}, text or a whole number was due"
    value = row.get(names["timestamp"])
    if isinstance(value, bool | list | dict | type(None)):
        return f"timestamp {value!r} is no number"
    if not isinstance(value, str | int | float):
        return None  # a date: Parquet has them, and Arrow reads them
    try:
        small_enough = abs(float(value)) < 2.0**63
    except (ValueError, OverflowError):
        return f"timestamp {value!r} is no number"
    return None if small_enough else f"timestamp {value!r} is not finite, or too large"


def _mixture(row: Row, first: Row, names: dict[str, str]) -> str | None:
    """JSON may mix text and numbers in a column; a column of ids or times may not."""
    for role, name in names.items():
        if isinstance(row[name], str) != isinstance(first[name], str):
            return f"{role} is {row[name]!r}, but {first[name]!r} in the first line: text and numbers are mixed"
    return None


def _find(path: Path, column: str, item_id: str) -> str:
    line = next((line for line, row in rows(path) if str(row.get(column)) == item_id), None)
    return str(path) if line is None else f"{path}:{line}"
