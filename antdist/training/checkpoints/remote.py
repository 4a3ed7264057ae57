"""Checkpoints on remote storage (`ray.remote_storage`), any that fsspec supports.

URI/NAME/                   the layout of the run's folder
  config.yaml, run.json     the run's configuration and record, for a start without its folder
  checkpoints/step-N/       as on disk; a checkpoint is one once its marker exists, which is written last
  best/                     the best weights, uploaded before the marker of a checkpoint that names them

A marker is written atomically: if the storage has folders, under a temporary name that is then renamed; else in one
request.
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
from antdist.io.files import flush_to_disk, write_atomically
from antdist.io.logs import get_logger
from antdist.io.storage import Unreachable, open_storage, retry_unreachable, translate_storage_errors
from antdist.training.checkpoints import BEST, CHECKPOINTS
from antdist.training.checkpoints.local import (
    FILES,
    MARKER,
    best_weights,
    check_checkpoint,
    checkpoint_name,
    describe,
    newest_complete,
    parse_steps,
    permanent_steps,
)

logger = get_logger(__name__)

KEY = "ray.remote_storage"
# object stores: they have no folders (creating one may create a bucket), and each write is atomic
BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"}
# parts of a file in transfer to or from S3; with its own defaults s3fs keeps half a gigabyte and more in memory
PART_BYTES, CONCURRENT_PARTS, MAX_PARTS = 16 * 2**20, 4, 5000
PROBE_SECONDS = 60.0
WAITS = (1.0, 5.0, 15.0)  # seconds between attempts at a resume, which depends on the storage

T = TypeVar("T")


class Remote:
    """One run's folder at `uri`. Used by the leader, and by the driver before the workers start.

    Raises:
        UserError: fsspec does not support the storage, or its package is missing.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._files, self._root = open_storage(self.uri, f"{KEY} {self.uri}")
        protocols = self._files.protocol
        kinds = {protocols} if isinstance(protocols, str) else {*protocols}
        self._has_folders, self._is_s3 = BUCKETS.isdisjoint(kinds), "s3" in kinds
        self._uploaded_best: dict[str, Any] | None = None  # by this process, as a checkpoint describes it
        self._best_names: dict[int, str | None] = {}  # the file that the checkpoint of each step names

    def upload(self, folder: Path, step: int, keep: int, keep_every: int | None) -> None:
        """Upload the checkpoint of `step` and its best weights; retain as `save_checkpoint` does.

        Newer checkpoints, from before a restart, are removed too. Nothing is uploaded twice.

        Raises:
            Unreachable: try again.
            UserError: the local files are damaged.
        """
        name = checkpoint_name(step)
        local = folder / CHECKPOINTS / name
        check_checkpoint(local)
        marker = (local / MARKER).read_bytes()
        if self.read(f"{CHECKPOINTS}/{name}/{MARKER}") != marker:
            self._remove(f"{CHECKPOINTS}/{name}/{MARKER}")
            self._best_names.pop(step, None)
            best = json.loads((local / "progress.json").read_text()).get("best")
            if best and best != self._uploaded_best:
                path = best_weights(folder, best["epoch"])
                faults.inject("upload", rank=0, step=step, file="best")
                self._put(path, f"best/{path.name}")
                self._uploaded_best = best
            for file in FILES:
                faults.inject("upload", rank=0, step=step, file=file)
                self._put(local / file, f"{CHECKPOINTS}/{name}/{file}")
            faults.inject("upload", rank=0, step=step, file=MARKER)
            self.write(f"{CHECKPOINTS}/{name}/{MARKER}", marker)
        faults.inject("upload", rank=0, step=step, file="prune")
        self._prune(step, keep, keep_every)

    def _prune(self, newest: int, keep: int, keep_every: int | None) -> None:
        complete = [step for step in self.steps() if step <= newest]
        kept = {*complete[-keep:], *permanent_steps(complete, keep_every)}
        for name in self._list(CHECKPOINTS):
            if name not in {checkpoint_name(step) for step in kept}:  # also what a killed upload left
                self._remove_checkpoint(name)
        needed = {self._best_name(step) for step in kept}
        for name in self._list(BEST):
            if name not in needed:
                self._remove(f"best/{name}")

    def _best_name(self, step: int) -> str | None:
        """The file name of the best weights that a checkpoint needs; None if it is damaged."""
        if step not in self._best_names:
            best = None
            with contextlib.suppress(ValueError):
                best = json.loads(self.read(f"{CHECKPOINTS}/{checkpoint_name(step)}/progress.json") or b"{}").get(
                    "best"
                )
            self._best_names[step] = best_weights(Path(), best["epoch"]).name if best else None
        return self._best_names[step]

    def _remove_checkpoint(self, name: str) -> None:
        """Remove a checkpoint, its marker first: a partly removed one must not pass for complete."""
        self._remove(f"{CHECKPOINTS}/{name}/{MARKER}")
        self._remove(f"{CHECKPOINTS}/{name}")

    def fetch_newest(self, folder: Path) -> None:
        """Fetch the newest complete checkpoint and its best weights, if it is newer than that of `folder`.

        Damaged ones are reported and skipped; they are removed once there is one to resume from.

        Raises:
            UserError: the storage is unreachable or has damaged ones only, and `folder` has no complete one.
        """
        here, damaged = newest_complete(folder / CHECKPOINTS), dict[int, UserError]()
        try:
            for step in reversed(_retry(self.steps)):
                if here is not None and step <= here:
                    break
                try:
                    _retry(lambda step=step: self._fetch(folder, step))  # type: ignore[misc]
                except Unreachable:
                    raise
                except UserError as damage:
                    logger.warning(f"skipped the damaged checkpoint of step {step}: {damage}")
                    damaged[step], oldest = damage, damage
                    continue
                here = step
                logger.info(f"fetched the checkpoint of step {step} from {self.uri}")
                break
            for step in damaged if here is not None else ():
                self._remove_checkpoint(checkpoint_name(step))
        except Unreachable as error:
            if here is None:
                raise UserError(
                    f"{error.what}; it may have checkpoints to resume from",
                    where=f"{KEY} {self.uri}",
                    remedy="restore the connection and run the same command again, or remove the key to ignore them",
                ) from error
            logger.warning(f"{error} The run resumes from its own folder")
        if damaged and here is None:
            raise UserError(
                f"all checkpoints are damaged, the oldest too: {oldest.where}: {oldest.what}",
                where=f"{self.uri}/checkpoints",
                remedy="restore a complete one from a copy, or remove the folder to start over",
            )

    def _fetch(self, folder: Path, step: int) -> None:
        """Fetch one checkpoint into `folder`, atomically. Raises UserError if it is damaged, naming the file."""
        parent, name = folder / CHECKPOINTS, checkpoint_name(step)
        there = f"{CHECKPOINTS}/{name}"
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in (*parent.glob(".fetching-*"), *parent.glob(".bringing-*")):  # the latter as of version 0.1.0
            shutil.rmtree(leftover)
        partial = parent / f".fetching-{name}"
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
                with write_atomically(path, sync="folder") as fetched:
                    self._get(f"best/{path.name}", fetched, best["file"])
        flush_to_disk(partial)
        shutil.rmtree(parent / name, ignore_errors=True)  # a damaged one, else there would be no need to fetch
        partial.rename(parent / name)
        flush_to_disk(parent)

    def _get(self, there: str, here: Path, described: dict[str, Any] | None) -> None:
        """Fetch one file and flush it to disk. Raises UserError if its size or digest differs."""
        try:
            with translate_storage_errors(self.uri):
                self._files.get_file(self._path(there), str(here), **self._part_options())
        except FileNotFoundError:
            here.unlink(missing_ok=True)
        if not here.is_file() or describe(here) != described:
            raise _damage(f"{self.uri}/{there}", "missing, truncated or modified")
        flush_to_disk(here)

    def steps(self) -> list[int]:
        """List the steps of the checkpoints that have a marker, oldest first. Raises Unreachable."""
        steps = parse_steps(self._list(CHECKPOINTS))
        return [step for step in steps if MARKER in self._list(f"{CHECKPOINTS}/{checkpoint_name(step)}")]

    def check(self) -> None:
        """Check that the storage can be written within a minute and outlives the process.

        Raises:
            UserError: it cannot, or does not.
        """
        if self.uri.startswith("memory:"):
            raise UserError(
                "this storage is private to one process and ends with it",
                where=f"{KEY} {self.uri}",
                remedy="use another",
            )
        name = f".probe-{uuid.uuid4().hex}"

        def probe() -> None:
            self.write(name, b"antdist checks whether it can write here")
            if self.read(name) is None:
                raise Unreachable(self.uri, "a file that was written cannot be read back")
            self._remove(name)

        try:
            _within(PROBE_SECONDS, probe)
        except (Unreachable, TimeoutError) as error:
            what = error.what if isinstance(error, Unreachable) else f"no answer in {PROBE_SECONDS:g} seconds"
            raise UserError(
                f"the storage cannot be written: {what}",
                where=f"{KEY} {self.uri}",
                remedy="correct the address or the permissions, or remove the key",
            ) from error

    def read(self, path: str) -> bytes | None:
        """Read a small file, None if it does not exist. Raises Unreachable."""
        try:
            with translate_storage_errors(self.uri):
                return bytes(self._files.cat_file(self._path(path)))
        except FileNotFoundError:
            return None

    def write(self, path: str, content: bytes) -> None:
        """Write a small file atomically. Raises Unreachable."""
        self._write_atomically(path, lambda place: self._files.pipe_file(place, content))

    def _put(self, here: Path, path: str) -> None:
        options = self._part_options(here.stat().st_size)
        self._write_atomically(path, lambda place: self._files.put_file(str(here), place, **options))

    def _part_options(self, size: int = 0) -> dict[str, int]:
        """Options that split a transfer into parts, an upload of `size` bytes into no more than S3 accepts."""
        part = max(PART_BYTES, math.ceil(size / MAX_PARTS))
        return {"chunksize": part, "max_concurrency": CONCURRENT_PARTS} if self._is_s3 else {}

    def _write_atomically(self, path: str, write: Callable[[str], Any]) -> None:
        """Call `write` with the place of `path`, or with a temporary name that is then renamed to it."""
        place = self._path(path)
        try:
            with translate_storage_errors(self.uri):
                if not self._has_folders:
                    write(place)
                    return
                self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
                write(f"{place}.partial")
                self._files.mv(f"{place}.partial", place)
        except FileNotFoundError as error:  # no such bucket
            raise Unreachable(self.uri, error) from error

    def _remove(self, path: str) -> None:
        """Remove a file or folder, if it exists."""
        with contextlib.suppress(FileNotFoundError), translate_storage_errors(self.uri):
            self._files.rm(self._path(path), recursive=True)

    def _list(self, path: str) -> list[str]:
        """List the names in a folder; empty if it does not exist."""
        try:
            with translate_storage_errors(self.uri):
                self._files.invalidate_cache()
                return [str(name).rstrip("/").rpartition("/")[2] for name in self._files.ls(self._path(path), False)]
        except FileNotFoundError:
            return []

    def _path(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"


def _damage(where: str, what: str) -> UserError:
    return UserError(what, where=where, remedy="use an older checkpoint")


def _retry(ask: Callable[[], T]) -> T:
    return retry_unreachable(ask, WAITS)


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Run `work`; after `seconds` raise TimeoutError and leave its thread running."""
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
