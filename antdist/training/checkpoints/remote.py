"""A run's checkpoints on storage that outlives the run's folder: any that fsspec reaches (`ray.remote_storage`).

URI/NAME/                   the layout of the run's folder
  config.yaml, run.json     what the run is, for a start that finds no folder
  checkpoints/step-N/       a checkpoint as on disk; it counts once its marker is there, which is written last
  best/                     the best weights, there before the marker of a checkpoint that names them

A marker is written whole: under another name first where there are folders, in one request where there are none.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from antdist import faults
from antdist.errors import UserError
from antdist.io.files import flush_to_disk
from antdist.io.logs import get_logger
from antdist.io.storage import Unreachable, asking, open_storage, patiently
from antdist.training.checkpoints.local import (
    FILES,
    MARKER,
    PREFIX,
    best_weights,
    check_checkpoint,
    describe,
    kept_for_good,
    newest_whole,
)

logger = get_logger(__name__)

KEY = "ray.remote_storage"
# what has buckets and no folders: to make a folder there may make a bucket, and a write is whole or not at all
BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"}
# of a file on its way to S3 or from there: s3fs by itself holds half a gigabyte, and more, of a checkpoint in memory
PIECE_BYTES, PIECES_AT_ONCE, MOST_PIECES = 16 * 2**20, 4, 5000
PROBE_SECONDS = 60.0
WAITS = (1.0, 5.0, 15.0)  # seconds between trials at a resume, which cannot go on without

T = TypeVar("T")


class Remote:
    """One run's folder at `uri`. Used by the leader alone, and by the driver before the workers start.

    Raises:
        UserError: fsspec knows no such storage, or its package is missing.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._files, self._root = open_storage(self.uri, f"{KEY} {self.uri}")
        protocols = self._files.protocol
        kinds = {protocols} if isinstance(protocols, str) else {*protocols}
        self._has_folders, self._is_s3 = BUCKETS.isdisjoint(kinds), "s3" in kinds
        self._best_sent: dict[str, Any] | None = None  # as a checkpoint describes it, by this process
        self._best_named: dict[int, str | None] = {}  # by the checkpoint of each step

    # -- a run --------------------------------------------------------------------------------------------------------

    def upload(self, folder: Path, step: int, keep: int, keep_every: int | None) -> None:
        """Copy the checkpoint of `step`, and the best weights that it names before its marker; then apply the retention of
        `save_checkpoint`, by which newer ones, which a restart has undone, go too. Nothing is copied twice.

        Raises:
            Unreachable: try again.
            UserError: it is damaged here.
        """
        name = f"{PREFIX}{step:08d}"
        local = folder / "checkpoints" / name
        check_checkpoint(local)
        marker = (local / MARKER).read_bytes()
        if self.read(f"checkpoints/{name}/{MARKER}") != marker:
            self._remove(f"checkpoints/{name}/{MARKER}")
            self._best_named.pop(step, None)
            best = json.loads((local / "progress.json").read_text()).get("best")
            if best and best != self._best_sent:
                path = best_weights(folder, best["epoch"])
                faults.at("upload", rank=0, step=step, file="best")
                self._put(path, f"best/{path.name}")
                self._best_sent = best
            for file in FILES:
                faults.at("upload", rank=0, step=step, file=file)
                self._put(local / file, f"checkpoints/{name}/{file}")
            faults.at("upload", rank=0, step=step, file=MARKER)
            self.write(f"checkpoints/{name}/{MARKER}", marker)
        faults.at("upload", rank=0, step=step, file="prune")
        self._prune(step, keep, keep_every)

    def _prune(self, newest: int, keep: int, keep_every: int | None) -> None:
        whole = [step for step in self.steps() if step <= newest]
        kept = {*whole[-keep:], *kept_for_good(whole, keep_every)}
        for name in self._names("checkpoints"):
            if name not in {f"{PREFIX}{step:08d}" for step in kept}:  # what a killed upload left, too
                self._drop(name)
        needed = {self._best_of(step) for step in kept}
        for name in self._names("best"):
            if name not in needed:
                self._remove(f"best/{name}")

    def _best_of(self, step: int) -> str | None:
        """The name of the best weights that a checkpoint needs; of a damaged one, which cannot be loaded either, none."""
        if step not in self._best_named:
            best = None
            with contextlib.suppress(ValueError):
                best = json.loads(self.read(f"checkpoints/{PREFIX}{step:08d}/progress.json") or b"{}").get("best")
            self._best_named[step] = best_weights(Path(), best["epoch"]).name if best else None
        return self._best_named[step]

    def _drop(self, name: str) -> None:
        """Remove a checkpoint, its marker first: it must not count while it is half there."""
        self._remove(f"checkpoints/{name}/{MARKER}")
        self._remove(f"checkpoints/{name}")

    def bring(self, folder: Path) -> None:
        """If the newest whole checkpoint here is newer than that of `folder`, put it there, with the best weights that it
        names. Damaged ones are named and passed over, and go once there is another to go on from.

        Raises:
            UserError: the storage is away, or holds damaged ones alone, and `folder` has no whole one.
        """
        here, damaged = newest_whole(folder / "checkpoints"), dict[int, UserError]()
        try:
            for step in reversed(_patiently(self.steps)):
                if here is not None and step <= here:
                    break
                try:
                    _patiently(lambda step=step: self._fetch(folder, step))  # type: ignore[misc]
                except Unreachable:
                    raise
                except UserError as damage:
                    logger.warning(f"the checkpoint of step {step} is passed over: {damage}")
                    damaged[step], oldest = damage, damage
                    continue
                here = step
                logger.info(f"the checkpoint of step {step} was brought from {self.uri}")
                break
            for step in damaged if here is not None else ():
                self._drop(f"{PREFIX}{step:08d}")
        except Unreachable as error:
            if here is None:
                raise UserError(
                    f"{error.what}, and there may be checkpoints to go on from",
                    where=f"{KEY} {self.uri}",
                    remedy="mend the connection and give the same command again; without the key nobody looks there",
                ) from error
            logger.warning(f"{error} The run goes on from its own folder")
        if damaged and here is None:
            raise UserError(
                f"all checkpoints are damaged, the oldest too: {oldest.where}: {oldest.what}",
                where=f"{self.uri}/checkpoints",
                remedy="bring a whole one back from a copy; to begin anew, remove the folder",
            )

    def _fetch(self, folder: Path, step: int) -> None:
        """Put one checkpoint into `folder`, whole or not at all. Raises UserError where it is damaged, naming the file."""
        parent, name = folder / "checkpoints", f"{PREFIX}{step:08d}"
        there = f"checkpoints/{name}"
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f".bringing-{PREFIX}*"):
            shutil.rmtree(left)
        partial = parent / f".bringing-{name}"
        partial.mkdir()
        marker = self.read(f"{there}/{MARKER}") or b""
        try:
            described = dict(json.loads(marker))
        except (ValueError, TypeError) as error:
            raise _damage(f"{self.uri}/{there}/{MARKER}", f"the marker cannot be read ({error})") from error
        for file in FILES:
            self._get(f"{there}/{file}", partial / file, described.get(file))
        (partial / MARKER).write_bytes(marker)
        best = json.loads((partial / "progress.json").read_text()).get("best")
        if best:
            path = best_weights(folder, best["epoch"])
            if not path.is_file() or describe(path) != best["file"]:
                path.parent.mkdir(exist_ok=True)
                fetched = path.with_suffix(".partial")
                self._get(f"best/{path.name}", fetched, best["file"])
                fetched.rename(path)
                flush_to_disk(path.parent)
        flush_to_disk(partial)
        shutil.rmtree(parent / name, ignore_errors=True)  # damaged, or we would not have asked
        partial.rename(parent / name)
        flush_to_disk(parent)

    def _get(self, there: str, here: Path, described: dict[str, Any] | None) -> None:
        """One file, down to the disk. Raises UserError if it is not as it was described."""
        try:
            with asking(self.uri):
                self._files.get_file(self._path(there), str(here), **self._pieces())
        except FileNotFoundError:
            here.unlink(missing_ok=True)
        if not here.is_file() or describe(here) != described:
            raise _damage(f"{self.uri}/{there}", "missing, cut short or altered")
        flush_to_disk(here)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that have a marker, oldest first. Raises Unreachable."""
        numbers = [name.removeprefix(PREFIX) for name in self._names("checkpoints") if name.startswith(PREFIX)]
        steps = sorted(int(number) for number in numbers if number.isdigit())
        return [step for step in steps if MARKER in self._names(f"checkpoints/{PREFIX}{step:08d}")]

    def check(self) -> None:
        """Write something small and remove it. Raises UserError where that fails, or takes longer than a minute; and of
        storage that ends with the process."""
        if self.uri.startswith("memory:"):
            raise UserError(
                "it is seen by one process alone, and ends with it", where=f"{KEY} {self.uri}", remedy="give another"
            )
        name = f".probe-{uuid.uuid4().hex}"

        def probe() -> None:
            self.write(name, b"antdist looks whether it may write here")
            if self.read(name) is None:
                raise Unreachable(self.uri, "what was written is not there")
            self._remove(name)

        try:
            _within(PROBE_SECONDS, probe)
        except (Unreachable, TimeoutError) as error:
            what = error.what if isinstance(error, Unreachable) else f"no answer in {PROBE_SECONDS:g} seconds"
            raise UserError(
                f"it cannot be written: {what}",
                where=f"{KEY} {self.uri}",
                remedy="correct the address or the permissions, or leave the key out",
            ) from error

    # -- the storage --------------------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes | None:
        """A small file, None if there is none. Raises Unreachable."""
        try:
            with asking(self.uri):
                return bytes(self._files.cat_file(self._path(path)))
        except FileNotFoundError:
            return None

    def write(self, path: str, content: bytes) -> None:
        """A small file, whole or not at all. Raises Unreachable."""
        self._whole(path, lambda place: self._files.pipe_file(place, content))

    def _put(self, here: Path, path: str) -> None:
        pieces = self._pieces(here.stat().st_size)
        self._whole(path, lambda place: self._files.put_file(str(here), place, **pieces))

    def _pieces(self, size: int = 0) -> dict[str, int]:
        """How a file is cut on its way; one of so many bytes that is sent, into no more pieces than S3 takes."""
        piece = max(PIECE_BYTES, math.ceil(size / MOST_PIECES))
        return {"chunksize": piece, "max_concurrency": PIECES_AT_ONCE} if self._is_s3 else {}

    def _whole(self, path: str, write: Callable[[str], Any]) -> None:
        """`write` to the place of `path` so that nobody sees half of it."""
        place = self._path(path)
        try:
            with asking(self.uri):
                if not self._has_folders:
                    write(place)
                    return
                self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
                write(f"{place}.partial")
                self._files.mv(f"{place}.partial", place)
        except FileNotFoundError as error:  # no such bucket
            raise Unreachable(self.uri, error) from error

    def _remove(self, path: str) -> None:
        """A file or folder; it may be gone."""
        with contextlib.suppress(FileNotFoundError), asking(self.uri):
            self._files.rm(self._path(path), recursive=True)

    def _names(self, path: str) -> list[str]:
        """What a folder holds; nothing if there is none."""
        try:
            with asking(self.uri):
                self._files.invalidate_cache()
                return [str(name).rstrip("/").rpartition("/")[2] for name in self._files.ls(self._path(path), False)]
        except FileNotFoundError:
            return []

    def _path(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"


def _damage(where: str, what: str) -> UserError:
    return UserError(what, where=where, remedy="use an older checkpoint")


def _patiently(ask: Callable[[], T]) -> T:
    return patiently(ask, WAITS)


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Raises TimeoutError if it takes longer, and leaves it behind."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="probe", daemon=True).start()
    done.result(seconds)
