"""Open users' files: detect gzip, CSV, JSON lines and Parquet by content, read rows with line numbers."""

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
    """Refuse a file that is missing, or is named `.gz` but is not gzip."""
    if not path.is_file():
        raise UserError("no such file", where=path, remedy="check the path; `antdist prepare --help` shows the options")
    if path.suffix == ".gz" and not is_gzip(path):
        raise UserError("is named .gz but is not gzip", where=path, remedy="rename the file, or compress it")


def is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """Open the file's uncompressed bytes.

    Raises:
        UserError: the file is missing, named .gz but not gzip, unreadable, or its gzip stream is truncated or damaged.
    """
    try:
        check_file(path)
        with gzip.open(path, "rb") if is_gzip(path) else path.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"the gzip file is truncated or damaged ({error})"
        raise UserError(what, where=path, remedy="export or download the file again") from None
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})", where=path, remedy="check the file's permissions"
        ) from None


@contextmanager
def open_text(path: Path, errors: Literal["strict", "surrogateescape"] = "strict") -> Iterator[IO[str]]:
    """Open the file's uncompressed UTF-8 text, without a byte order mark and with its own line ends.

    Args:
        errors: `surrogateescape` reads invalid bytes as lone surrogates, which `is_valid_text` finds.
    """
    with open_binary(path) as stream:
        try:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors=errors, newline="")
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 text ({error.reason})"
            raise UserError(what, where=path, remedy="convert the file to UTF-8") from None


def detect_kind(path: Path) -> Kind:
    """Detect CSV, JSON lines or Parquet by content."""
    with open_binary(path) as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        if is_gzip(path):
            remedy = "uncompress the file: Parquet has its own compression"
            raise UserError("is Parquet inside gzip", where=path, remedy=remedy)
        return "parquet"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        raise UserError("is a JSON array", where=path, remedy="write JSON lines: one object a line")
    if not start:
        raise UserError("is empty", where=path, remedy="export the file again")
    return "jsonl" if start.startswith(b"{") else "csv"


def detect_delimiter(header: str) -> str:
    """Return tab if the header has one, else comma."""
    return "\t" if "\t" in header else ","


def read_csv_header(path: Path) -> tuple[list[str], str]:
    """Read the column names and the delimiter."""
    with open_text(path, "surrogateescape") as text:
        line = text.readline()
    if not is_valid_text(line):
        raise _not_utf8(path, 1)
    mark = detect_delimiter(line)
    try:
        names = next(csv.reader([line], delimiter=mark))
    except csv.Error as error:
        raise UserError(f"is not CSV: {error}", where=f"{path}:1", remedy="fix the header") from None
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two columns are named {duplicate!r}", where=f"{path}:1", remedy="rename one of them")
    return names, mark


def is_valid_text(text: str) -> bool:
    """Return whether the text can be encoded as UTF-8, that is, has no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_rows(path: Path, bad: FileQuarantine | None = None) -> Iterator[tuple[int, Row]]:
    """Read rows with the line (Parquet: row) at which each starts, counted from 1; slow and exact.

    Args:
        bad: takes rows that have too few or too many columns, are not a JSON object or not UTF-8. None: the first such
            row is refused.

    Raises:
        UserError: naming the line of a bad row; or the file cannot be read.
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
                    remedy = "fix the row; quote fields that contain the delimiter"
                    fault = UserError(what, where=f"{path}:{start}", remedy=remedy)
                elif not all(map(is_valid_text, fields)):
                    fault = _not_utf8(path, start)
                if fault is not None:
                    bad.add(fault, start, records=line - start + 1)  # an open quote spans lines
                    continue
                yield start, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            where = f"{path}:{reader.line_num}"
            raise UserError(f"is not CSV: {error}", where=where, remedy="fix or delete the line") from None


def _not_utf8(path: Path, line: int) -> UserError:
    return UserError("is not UTF-8 text", where=f"{path}:{line}", remedy="convert the file to UTF-8")


def read_json_rows(path: Path, bad: FileQuarantine | None = None) -> Iterator[tuple[int, Row]]:
    """Read the objects of a JSON lines file with their lines; see `read_rows`."""
    bad = bad or Quarantine().inspect(path)
    with open_text(path, "surrogateescape") as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                if not is_valid_text(line):
                    raise _not_utf8(path, number)
                yield number, _parse_object(line, f"{path}:{number}")
            except UserError as fault:
                bad.add(fault, number)


def _parse_object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON: {error}", where=where, remedy="fix or delete the line") from None
    if not isinstance(row, dict):
        raise UserError("is not a JSON object", where=where, remedy="fix or delete the line")
    return row


def read_first_object(path: Path) -> Row:
    """Read the first object of a JSON lines file, skipping bad lines, which a full reading reports."""
    lenient = Quarantine(1.0).inspect(path)
    found = next((row for _, row in read_json_rows(path, lenient)), None)
    if found is None:
        lenient.close()
        raise UserError("contains no JSON objects", where=path, remedy="write JSON lines: one object a line")
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
    """Open a file for pyarrow.parquet, and raise its errors as UserError."""
    import pyarrow as pa

    check_file(path)
    try:
        with path.open("rb") as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"the Parquet file cannot be read ({str(error).splitlines()[0]})"
        raise UserError(what, where=path, remedy="write the file again") from None
