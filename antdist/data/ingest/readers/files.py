"""Opening users' files: gzip told by content, CSV, JSON lines and Parquet told apart, rows with their line numbers."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from antdist.data.quarantine import FileQuarantine, Quarantine
from antdist.errors import UserError

Kind = Literal["csv", "jsonl", "parquet"]
Row = dict[str, Any]
LONGEST_FIELD = 64 << 20


def check_file(path: Path) -> None:
    """Raise a UserError if the file is missing, or named `.gz` and not gzip."""
    if not path.is_file():
        raise UserError("no such file", where=path, remedy="check the path; `antdist prepare --help` shows the options")
    if path.suffix == ".gz" and not is_gzip(path):
        raise UserError("is named .gz but is not gzip", where=path, remedy="rename it without .gz, or compress it")


def is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, uncompressed.

    Raises:
        UserError: it is missing, named .gz but not gzip, or its gzip stream is cut short or damaged.
    """
    try:
        check_file(path)
        with gzip.open(path, "rb") if is_gzip(path) else path.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"the gzip file is cut short or damaged ({error})"
        raise UserError(what, where=path, remedy="fetch it again") from None
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})", where=path, remedy="check the file's permissions"
        ) from None


@contextmanager
def open_text(path: Path, errors: Literal["strict", "surrogateescape"] = "strict") -> Iterator[IO[str]]:
    """The file's text as UTF-8, uncompressed, a byte order mark skipped, line ends as they are. With `surrogateescape`
    bytes that are no UTF-8 become lone surrogates, so that the rest can be read (`is_text`)."""
    with open_binary(path) as stream:
        try:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors=errors, newline="")
        except UnicodeDecodeError as error:
            raise UserError(f"is not UTF-8 text ({error.reason})", where=path, remedy="convert it to UTF-8") from None


def detect_kind(path: Path) -> Kind:
    """CSV, JSON lines or Parquet, by content."""
    with open_binary(path) as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        if is_gzip(path):
            raise UserError("is Parquet inside gzip", where=path, remedy="uncompress it: Parquet compresses itself")
        return "parquet"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        raise UserError("is a JSON array", where=path, remedy="write JSON lines: one object a line")
    if not start:
        raise UserError("is empty", where=path)
    return "jsonl" if start.startswith(b"{") else "csv"


def detect_delimiter(header: str) -> str:
    """Tab where the header has one, else comma."""
    return "\t" if "\t" in header else ","


def read_csv_header(path: Path) -> tuple[list[str], str]:
    """Column names and the delimiter."""
    with open_text(path, "surrogateescape") as text:
        line = text.readline()
    if not is_valid_text(line):
        raise _not_utf8(path, 1)
    mark = detect_delimiter(line)
    try:
        names = next(csv.reader([line], delimiter=mark))
    except csv.Error as error:
        raise UserError(f"is not CSV: {error}", where=f"{path}:1") from None
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two columns are called {twice!r}", where=f"{path}:1", remedy="rename one of them")
    return names, mark


def is_valid_text(text: str) -> bool:
    """Whether it can be written as UTF-8: no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_rows(path: Path, bad: FileQuarantine | None = None) -> Iterator[tuple[int, Row]]:
    """All rows one by one with the line (Parquet: row) they begin at, counted from 1; slow and exact.

    Args:
        bad: takes the rows that have too few or too many columns, or are not a JSON object, or not UTF-8. None: the
            first such row is refused.

    Raises:
        UserError: such a row, naming the line; or the file cannot be read.
    """
    bad = bad or Quarantine().inspect(path)
    return {"csv": _csv_rows, "jsonl": read_json_rows, "parquet": _parquet_rows}[detect_kind(path)](path, bad)


def _csv_rows(path: Path, bad: FileQuarantine) -> Iterator[tuple[int, Row]]:
    header, mark = read_csv_header(path)
    csv.field_size_limit(LONGEST_FIELD)
    with open_text(path, "surrogateescape") as text:
        reader = csv.reader(text, delimiter=mark)
        line = 0
        try:
            for fields in reader:
                start, line = line + 1, reader.line_num
                if start == 1 or not fields:
                    continue
                fault = None
                if len(fields) != len(header):
                    many = "few" if len(fields) < len(header) else "many"
                    what = f"too {many} columns: {len(fields)}, the header has {len(header)}"
                    remedy = "mend the row; quote fields that hold the delimiter"
                    fault = UserError(what, where=f"{path}:{start}", remedy=remedy)
                elif not all(map(is_valid_text, fields)):
                    fault = _not_utf8(path, start)
                if fault is not None:
                    bad.add(fault, start, records=line - start + 1)  # an open quote swallows lines
                    continue
                yield start, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise UserError(f"is not CSV: {error}", where=f"{path}:{reader.line_num}") from None


def _not_utf8(path: Path, line: int) -> UserError:
    return UserError("is not UTF-8 text", where=f"{path}:{line}", remedy="convert it to UTF-8")


def read_json_rows(path: Path, bad: FileQuarantine | None = None) -> Iterator[tuple[int, Row]]:
    """The objects of a JSON lines file with their lines; see `rows`."""
    bad = bad or Quarantine().inspect(path)
    with open_text(path, "surrogateescape") as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                if not is_valid_text(line):
                    raise _not_utf8(path, number)
                yield number, _object(line, f"{path}:{number}")
            except UserError as fault:
                bad.add(fault, number)


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON: {error}", where=where, remedy="mend or delete the line") from None
    if not isinstance(row, dict):
        raise UserError("is not a JSON object", where=where, remedy="mend or delete the line")
    return row


def read_first_object(path: Path) -> Row:
    """The first object of a JSON lines file; bad lines before it are left to those who read them all."""
    lenient = Quarantine(1.0).inspect(path)
    found = next((row for _, row in read_json_rows(path, lenient)), None)
    if found is None:
        lenient.close()
        raise UserError("holds no JSON objects", where=path)
    return found


def _parquet_rows(path: Path, bad: FileQuarantine) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet as pq

    number = 0
    with open_parquet(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(4096):
            for row in batch.to_pylist():
                number += 1
                yield number, row


@contextmanager
def open_parquet(path: Path) -> Iterator[IO[bytes]]:
    """The file for pyarrow.parquet, its errors told as the user's."""
    import pyarrow as pa

    check_file(path)
    try:
        with path.open("rb") as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"the Parquet file cannot be read ({str(error).splitlines()[0]})", where=path) from None
