"""The folder that `antdist score` fills: files come there whole, and it says what they were made from.

part-00000.parquet ...  the parts
_parts/inputs.json      written first: what all that lies here was made from
_parts/00000.json       a note of each part, written after it: a part counts by its note
_score.json             written last: all of that
Whoever reads a folder of Parquet files passes over names that begin with "_".
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from antdist.errors import UserError
from antdist.io.files import file_sha256, flush_to_disk
from antdist.io.storage import asking, open_storage

SUMMARY, INPUTS = "_score.json", "_parts/inputs.json"


class Output:
    """A local folder, which all nodes of a cluster share, or a URI that fsspec knows.

    Raises (every method, too):
        UserError: fsspec knows no such storage, its package is missing, it does not answer, or refuses.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._files, root = open_storage(place, f"--out {place}")
        self._root = PurePosixPath(root)
        self.is_local = "file" in self._files.protocol

    def __reduce__(self) -> tuple[Any, ...]:
        return Output, (self.place,)

    def claim(self, inputs: Mapping[str, str]) -> None:
        """Make this the folder of what is made from `inputs`, if it is empty or is that already.

        Raises:
            UserError: it holds something else; naming what differs.
        """
        known = self.read_json(INPUTS)
        if known is None:
            if self._sizes():
                raise UserError(
                    "is not empty, and `antdist score` did not begin it",
                    where=self.place,
                    remedy="name another --out, or empty this one",
                )
            self.write_json(INPUTS, dict(inputs))
            return
        differing = [key for key in sorted(known.keys() | inputs.keys()) if known.get(key) != inputs.get(key)]
        if differing:
            key, *more = differing
            raise UserError(
                f"holds what was made from other inputs: {key} was {_short(known.get(key))}, here it is "
                f"{_short(inputs.get(key))}" + (f"; {', '.join(more)} differ too" if more else ""),
                where=self.place,
                remedy="name another --out, or empty this one",
            )

    def finished(self) -> dict[int, dict[str, Any]]:
        """The notes of the parts that are whole, by number: of the size that was written, in a local folder of the same
        digest."""
        names = [name for name in self._sizes("_parts") if name.partition(".")[0].isdigit()]
        with ThreadPoolExecutor(16) as pool:
            notes = [
                note for note in pool.map(self.read_json, [f"_parts/{name}" for name in names]) if note is not None
            ]
        lost = set(self.lost(notes))
        whole = [note for note in notes if note["name"] not in lost]
        if self.is_local:
            whole = [note for note in whole if file_sha256(Path(self._root / note["name"])) == note["sha256"]]
        return {note["number"]: note for note in whole}

    def lost(self, notes: Iterable[Mapping[str, Any]]) -> list[str]:
        """The parts that are not there, or of another size than their notes say."""
        sizes = self._sizes()
        return [note["name"] for note in notes if sizes.get(note["name"]) != note["bytes"]]

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A local file to write, which comes to its place when the block ends, and a dictionary that then says its `name`,
        `bytes` and `sha256`."""
        facts: dict[str, Any] = {}
        with self._beside(name) as path:
            yield path, facts
            facts |= {"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            flush_to_disk(path)
            place = self._root / name
            if self.is_local:
                path.replace(place)
                flush_to_disk(Path(place.parent))
            else:
                self._put(path, str(place))

    def _put(self, path: Path, place: str) -> None:
        try:
            with self._asking():
                self._files.put_file(str(path), place)
        except FileNotFoundError as error:
            raise UserError(
                f"cannot be written to ({error})", where=self.place, remedy="make the bucket first"
            ) from None

    @contextlib.contextmanager
    def _beside(self, name: str) -> Iterator[Path]:
        """A temporary file: in a local folder on the same disk, so that it can be renamed."""
        if not self.is_local:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / PurePosixPath(name).name
            return
        place = Path(self._root / name)
        place.parent.mkdir(parents=True, exist_ok=True)
        path = place.with_name(f".{place.name}.{socket.gethostname()}-{os.getpid()}.tmp")
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """None where there is no such file, or what it holds is no JSON object."""
        try:
            with self._asking():
                text = self._files.cat_file(str(self._root / name))
            content = json.loads(text)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        with self.writing(name) as (path, _):
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._asking():
            self._files.rm_file(str(self._root / name))

    def sweep(self) -> None:
        """Remove what killed workers left half written."""
        for name in self._sizes():
            if name.startswith(".part-") and name.endswith(".tmp"):
                self.remove(name)

    def _sizes(self, folder: str = "") -> dict[str, int]:
        """What lies in a folder, and how many bytes each file has, as it is at this moment."""
        try:
            with self._asking():
                self._files.invalidate_cache()
                entries = self._files.ls(str(self._root / folder), detail=True)
        except FileNotFoundError:
            return {}
        return {PurePosixPath(entry["name"]).name: entry["size"] for entry in entries}

    def _asking(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.is_local else asking(self.place)


def _short(value: object) -> str:
    """A digest by its first digits."""
    return "absent" if value is None else str(value)[:12]
