"""The folder that `antdist score` fills: files appear complete, and it records its inputs.

_parts/inputs.json      written first: digests of everything that the files are computed from
part-00000.parquet ...  the parts
_parts/00000.json       the note of a part, written after it: a part is finished when its note exists
_score.json             written last: the summary
Readers of a folder of Parquet files skip names that start with "_".
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from antdist.errors import UserError
from antdist.io.files import file_sha256, write_atomically, writer_suffix
from antdist.io.storage import open_storage, translate_storage_errors

SUMMARY, INPUTS = "_score.json", "_parts/inputs.json"


class ScoreFolder:
    """The output of `antdist score`: a folder that all nodes share, or a URI that fsspec knows.

    Raises (every method, too):
        UserError: fsspec knows no such storage, its package is missing, it does not answer, or refuses.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._files, root = open_storage(place, f"--out {place}")
        self._root = PurePosixPath(root)
        self.is_local = "file" in self._files.protocol

    def __reduce__(self) -> tuple[Any, ...]:
        return ScoreFolder, (self.place,)

    def claim(self, inputs: Mapping[str, str]) -> None:
        """Reserve an empty folder for these inputs, or check that it was reserved for the same.

        Raises:
            UserError: it holds something else; the message names the input that differs.
        """
        known = self.read_json(INPUTS)
        if known is None:
            if self._sizes():
                raise UserError(
                    "is not empty, and `antdist score` did not create it",
                    where=self.place,
                    remedy="name another --out, or empty this one",
                )
            self.write_json(INPUTS, dict(inputs))
            return
        differing = [key for key in sorted(known.keys() | inputs.keys()) if known.get(key) != inputs.get(key)]
        if differing:
            key, *more = differing
            raise UserError(
                f"holds scores of other inputs: {key} was {_abbreviate(known.get(key))}, now it is "
                f"{_abbreviate(inputs.get(key))}" + (f"; {', '.join(more)} differ too" if more else ""),
                where=self.place,
                remedy="name another --out, or empty this one",
            )

    def read_finished(self) -> dict[int, dict[str, Any]]:
        """Read the notes of complete parts by number: size as recorded, in a local folder also digest."""
        names = [name for name in self._sizes("_parts") if name.partition(".")[0].isdigit()]
        with ThreadPoolExecutor(16) as pool:
            notes = [
                note for note in pool.map(self.read_json, [f"_parts/{name}" for name in names]) if note is not None
            ]
        missing = set(self.find_missing(notes))
        complete = [note for note in notes if note["name"] not in missing]
        if self.is_local:
            complete = [note for note in complete if file_sha256(Path(self._root / note["name"])) == note["sha256"]]
        return {note["number"]: note for note in complete}

    def find_missing(self, notes: Iterable[Mapping[str, Any]]) -> list[str]:
        """List the parts that are missing, or whose size differs from their note's."""
        sizes = self._sizes()
        return [note["name"] for note in notes if sizes.get(note["name"]) != note["bytes"]]

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Write a local file that moves to its place, complete and flushed, when the block ends.

        Yields:
            The file, and a dictionary that gets its `name`, `bytes` and `sha256` at the end of the block.
        """
        facts: dict[str, Any] = {}
        with self._temporary_file(name) as path:
            yield path, facts
            facts |= {"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            if not self.is_local:
                self._put(path, str(self._root / name))

    def _put(self, path: Path, place: str) -> None:
        try:
            with self._storage_errors():
                self._files.put_file(str(path), place)
        except FileNotFoundError as error:
            raise UserError(
                f"cannot be written to ({error})", where=self.place, remedy="create the bucket first"
            ) from None

    @contextlib.contextmanager
    def _temporary_file(self, name: str) -> Iterator[Path]:
        """Yield a temporary file, which in a local folder takes the place of `name` when the block ends."""
        if not self.is_local:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / PurePosixPath(name).name
            return
        place = Path(self._root / name)
        place.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(place, sync="folder", suffix=writer_suffix()) as path:
            yield path

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON object, or return None if there is no such file or it holds something else."""
        try:
            with self._storage_errors():
                text = self._files.cat_file(str(self._root / name))
            content = json.loads(text)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        with self.writing(name) as (path, _):
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._storage_errors():
            self._files.rm_file(str(self._root / name))

    def remove_partial(self) -> None:
        """Remove the files that killed workers left incomplete."""
        for name in self._sizes():
            if name.startswith(".part-") and name.endswith(".tmp"):
                self.remove(name)

    def _sizes(self, folder: str = "") -> dict[str, int]:
        """List a folder's files with their current sizes in bytes, past fsspec's cache."""
        try:
            with self._storage_errors():
                self._files.invalidate_cache()
                entries = self._files.ls(str(self._root / folder), detail=True)
        except FileNotFoundError:
            return {}
        return {PurePosixPath(entry["name"]).name: entry["size"] for entry in entries}

    def _storage_errors(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.is_local else translate_storage_errors(self.place)


def _abbreviate(value: object) -> str:
    """Cut a digest to its first digits."""
    return "absent" if value is None else str(value)[:12]
