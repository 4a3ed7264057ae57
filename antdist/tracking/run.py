"""One MLflow run a job. Every record goes through an outbox on disk, so the server may be away (architecture, law 7).

`log` appends to the outbox and returns; a thread of its own delivers, in order. Delivering twice does no harm: a metric's
point is known by key, step, value and the time when it was logged, which the outbox keeps.

In a long outage the outbox grows ever more slowly: with each `SPARSER_EACH` bytes that wait, a metric of many points gets half
as many from then on. All other records are kept.

A run that begins while the server is away gets a name of its own, `offline-...`. Its MLflow run is made by whoever first
reaches the server, and bears that name as a tag, so that it is made once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from antdist import __version__
from antdist.errors import UserError
from antdist.io.files import read_json, write_json
from antdist.io.logs import get_logger
from antdist.tracking.store import (
    StoreAway,
    artifact_location,
    check_reachable,
    connect,
    moving_files,
    patiently,
    redact,
    refused,
    told_clearly,
)

LIBRARIES = ("torch", "deepspeed", "ray", "transformers", "webdataset", "mlflow", "numpy")
INTERVAL = 2.0  # seconds between deliveries
LONGEST_WAIT = 60.0  # seconds between trials while the server is away
SPARSER_EACH = 64 * 2**20  # undelivered bytes
FEW_POINTS = 1000  # so many of a metric wait in any case
OFFLINE = "offline-"
OFFLINE_TAG = "antdist.offline"

# What MLflow takes in one log_batch, and how long a value may be.
MOST_ENTRIES, MOST_PARAMS_OR_TAGS = 1000, 100
LONGEST_PARAM, LONGEST_TAG, LONGEST_KEY = 6000, 8000, 250

Record = dict[str, Any]
logger = get_logger(__name__)


@dataclass(frozen=True)
class Undelivered:
    """What a run could not deliver in time, and the file where it waits."""

    records: int
    outbox: Path


def start_run(
    uri: str,
    experiment: str,
    name: str,
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    run_id: str | None = None,
    offline_ok: bool = False,
) -> TrackedRun:
    """Begin a run, or go on with the run `run_id` (the server may be away then).

    Args:
        folder: the run's local folder; the outbox lies there.
        config: the resolved configuration, nested (`model_dump(mode="json")`): becomes params with dotted keys, and whole
            the artifact `config.yaml`. Credentials in URIs are cut out.
        tags: added to `environment_tags`.
        offline_ok: a new run may begin without a server.

    Raises:
        UserError: a new run and no server (but with `offline_ok`), an experiment that was deleted, a `run_id` that the store does not know.
    """
    if run_id is None:
        try:
            check_reachable(uri)
            run_id = _create_run(uri, experiment, name)
        except StoreAway as error:
            if not offline_ok:
                raise
            logger.warning("the run begins offline, its records wait: %s", error)
            run_id = OFFLINE + uuid.uuid4().hex
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{run_id}.json", {"experiment": experiment, "name": name})
        resumed = False
    else:
        check_known(uri, run_id)
        resumed = True
    run = TrackedRun(uri, run_id, folder, resumed=resumed)
    run.set_tags({**environment_tags(), **(tags or {})})
    if config is not None:
        run.log_params(config)
        run.log_text("config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    return run


def stored_run(uri: str, run_id: str, folder: Path) -> str:
    """The MLflow run of a run in `folder`: itself, but for one that began offline. While the store is away it is tried again
    for about two minutes.

    Raises:
        UserError: a store that is away.
    """
    return patiently(lambda: _stored_run(uri, run_id, folder), uri)


def _stored_run(uri: str, run_id: str, folder: Path) -> str:
    file = folder / f"{run_id}.json"
    begun = read_json(file) if run_id.startswith(OFFLINE) else {"run_id": run_id}
    assert begun is not None, f"{file} is gone"
    if "run_id" not in begun:
        # looked for first: it may be there without our knowing, its answer lost
        client, experiment = connect(uri), _experiment(uri, begun["experiment"])
        found = client.search_runs([experiment], f"tags.`{OFFLINE_TAG}` = '{run_id}'", max_results=1)
        run = found[0] if found else client.create_run(experiment, run_name=begun["name"], tags={OFFLINE_TAG: run_id})
        begun["run_id"] = run.info.run_id
        write_json(file, begun)
    return str(begun["run_id"])


def _create_run(uri: str, experiment: str, name: str) -> str:
    with told_clearly(uri):
        return str(connect(uri).create_run(_experiment(uri, experiment), run_name=name).info.run_id)


def _experiment(uri: str, experiment: str) -> str:
    """The number of an experiment, made if need be."""
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            client.create_experiment(experiment, artifact_location=artifact_location(uri))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another job made it in the same moment
                raise
        found = client.get_experiment_by_name(experiment)
    if found.lifecycle_stage != "active":
        raise UserError(
            f"the experiment {experiment!r} was deleted",
            where="tracking.experiment",
            remedy=f"restore it with `mlflow experiments restore --experiment-id {found.experiment_id}` or choose another name",
        )
    return str(found.experiment_id)


def check_known(uri: str, run_id: str) -> None:
    """Raises UserError if the store says that it knows no such run; warns if it is away."""
    from mlflow.exceptions import MlflowException

    if run_id.startswith(OFFLINE):
        return
    try:
        check_reachable(uri)
        connect(uri).get_run(run_id)
    except (UserError, MlflowException) as error:
        if refused(error):
            raise UserError(
                f"the tracking store knows no run {run_id!r}",
                where=redact(uri),
                remedy="check tracking.uri, or start a new run",
            ) from None
        logger.warning("the tracking store is away; the run goes on and its records wait: %s", error)


class TrackedRun:
    """A run that is being written. One process a run writes (rank 0, or the driver before and after the workers)."""

    def __init__(self, uri: str, run_id: str, folder: Path, *, resumed: bool) -> None:
        self.uri, self.run_id = uri, run_id
        self.outbox = folder / f"outbox-{run_id}.jsonl"
        self.rejected = folder / f"rejected-{run_id}.jsonl"
        self._client: Any = None
        self._stored = ""  # the run's id at the server
        self._given_up = False  # finish() has returned: the outbox may be another's
        self._level = 0  # times `SPARSER_EACH` bytes wait
        self._left_out = 0  # points, since the last delivery
        self._unwritten: list[bytes] = []  # empty, but while the disk refuses
        self._sent = 0  # bytes of the outbox that the server has
        self._writing, self._sending = threading.Lock(), threading.Lock()
        self._away = False
        self._caught_up = not resumed
        self._server_params: set[str] = set()
        self._server_steps: dict[str, int] = {}  # last step of each metric, when this resumed run caught up
        self._not_finite: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self._outbox_points: dict[str, int] = {}  # of each metric that were to wait in the outbox
        self._outbox_steps: dict[str, int] = {}  # last step of each metric that an earlier process left undelivered
        self._mend()
        self._closing, self._deadline = threading.Event(), math.inf
        self._thread = threading.Thread(target=self._deliver_until_closed, name="tracking", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Note one point a metric. Never waits for the server, never raises because of it.

        "@" in a name becomes "_at_" (MLflow refuses it). NaN is kept as NaN; infinity becomes NaN, since MLflow would store the
        largest float and ruin the plot; either is warned of once a metric. Points that the run already has from before it was
        resumed are not taken twice. While `SPARSER_EACH` bytes wait, metrics of many points get every second one, while twice
        as many do, every fourth, and so on.
        """
        now = int(time.time() * 1000)
        records = []
        for name, value in metrics.items():
            key, number = clean_key(name), float(value)
            if not math.isfinite(number):
                if key not in self._not_finite:
                    logger.warning("metric %s is %s at step %d: recorded as NaN", key, number, step)
                self._not_finite.add(key)
                number = math.nan
            if step > self._outbox_steps.get(key, -1) and self._is_kept(key):
                records.append({"kind": "metric", "key": key, "value": number, "timestamp": now, "step": step})
        self._append(records)

    def _is_kept(self, key: str) -> bool:
        """Whether the next point of a metric is not left out for want of space."""
        points = self._outbox_points[key] = self._outbox_points.get(key, 0) + 1
        kept = points <= FEW_POINTS or points % 2**self._level == 0
        self._left_out += not kept
        return kept

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Note nested configuration as params with dotted keys, cut at MLflow's limit."""
        flat = flatten(config).items()
        self._append([{"kind": "param", "key": clean_key(k), "value": redact(v)[:LONGEST_PARAM]} for k, v in flat])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Note tags, cut at MLflow's limit."""
        self._append(
            [{"kind": "tag", "key": clean_key(k), "value": redact(str(v))[:LONGEST_TAG]} for k, v in tags.items()]
        )

    def log_text(self, path: str, text: str) -> None:
        """Note a small text (YAML, JSON, a table) as the artifact `path`."""
        self._append([{"kind": "text", "path": path, "text": redact(text)}])

    def log_artifacts(self, folder: Path, path: str) -> None:
        """Note that the files of `folder` belong below the artifact path. They must stay in place until delivered."""
        self._append([{"kind": "artifacts", "folder": str(folder.resolve()), "path": path}])

    def flush(self) -> bool:
        """Deliver now, in the caller's thread (it may wait for the server). True if nothing is left."""
        try:
            self._deliver()
        except Exception as error:  # whatever the server, the network or a driver below MLflow raises
            if not self._away:
                logger.warning("tracking is away, records wait in %s: %s", self.outbox, error)
            self._away = True
            return False
        if self._away:
            logger.info("tracking is back, all records are delivered")
        self._tell_left_out()
        self._away = False
        return True

    def finish(self, status: str | None = "FINISHED", timeout: float = 30.0) -> Undelivered | None:
        """End this process' part, within `timeout` seconds. None if all is delivered, else what waits and where.

        Args:
            status: FINISHED, FAILED or KILLED ends the run; None leaves it running, for another process to go on with.
        """
        if status is not None:
            self._append([{"kind": "status", "status": status, "timestamp": int(time.time() * 1000)}])
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout)
        with self._writing:
            self._given_up = True
        waiting = self._waiting()
        if not waiting:
            return None
        logger.warning(
            "%d tracking records of run %s are not delivered; they wait in %s", waiting, self.run_id, self.outbox
        )
        self._tell_left_out()
        return Undelivered(waiting, self.outbox)

    def _deliver_until_closed(self) -> None:
        wait = INTERVAL
        while not self._closing.wait(wait):
            wait = INTERVAL if self.flush() else min(2 * wait, LONGEST_WAIT)
        while not self.flush() and time.monotonic() < self._deadline:
            time.sleep(0.5)

    def _mend(self) -> None:
        """Drop what a killed process left half written; learn the points that are in the outbox."""
        self.outbox.touch()
        mended = self.outbox.with_suffix(".mended")
        with self.outbox.open("rb") as file, mended.open("wb") as whole:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    logger.warning("%s: a record is cut short and dropped", self.outbox)
                    continue
                whole.write(line.rstrip() + b"\n")
                if record["kind"] == "metric":
                    key = record["key"]
                    self._outbox_steps[key] = max(self._outbox_steps.get(key, -1), record["step"])
                    self._outbox_points[key] = self._outbox_points.get(key, 0) + 1
        mended.replace(self.outbox)

    def _append(self, records: list[Record]) -> None:
        """Write to the outbox, all or nothing; keep in memory while the disk refuses."""
        with self._writing:
            refused_before = bool(self._unwritten)
            self._unwritten += [json.dumps(record).encode() + b"\n" for record in records]
            data = b"".join(self._unwritten)
            try:
                with self.outbox.open("ab", buffering=0) as file:
                    before = file.seek(0, os.SEEK_END)
                    self._tell_level(before + len(data) - self._sent)
                    if file.write(data) < len(data):
                        file.truncate(before)
                        raise OSError("the disk is full")
                self._unwritten.clear()
            except OSError as error:
                if not refused_before:
                    logger.warning("cannot write %s, tracking records wait in memory: %s", self.outbox, error)

    def _tell_level(self, waiting: int) -> None:
        level = waiting // SPARSER_EACH
        if level > self._level:
            logger.warning(
                "%d MiB of tracking records wait in %s; of metrics of many points one in %d is kept from here on",
                waiting // 2**20,
                self.outbox,
                2**level,
            )
        self._level = level

    def _tell_left_out(self) -> None:
        if self._left_out:
            logger.warning("%d points of long curves were left out, as the outbox was large", self._left_out)
        self._left_out = 0

    def _deliver(self) -> None:
        with self._sending:
            self._append([])
            if self._client is None:
                self._client = connect(self.uri)
            if not self._stored:
                self._stored = _stored_run(self.uri, self.run_id, self.outbox.parent)
            if not self._caught_up:
                self._catch_up()
            while not self._given_up:
                batch, end = self._next_batch()
                if not batch:
                    break
                self._send(batch)
                self._sent = end
            with self._writing:
                if not self._given_up and self.outbox.stat().st_size == self._sent:
                    os.truncate(self.outbox, 0)
                    self._sent, self._level = 0, 0
                    self._outbox_points.clear()

    def _next_batch(self) -> tuple[list[Record], int]:
        """The next undelivered records that go in one call, and where they end in the outbox."""
        batch: list[Record] = []
        counts = {"metric": 0, "param": 0, "tag": 0}
        with self.outbox.open("rb") as file:
            end = file.seek(self._sent)
            for line in file:
                if not line.endswith(b"\n"):  # being written
                    break
                record = json.loads(line)
                kind = record["kind"]
                if kind not in counts:  # goes alone
                    return ([record], end + len(line)) if not batch else (batch, end)
                counts[kind] += 1
                if len(batch) == MOST_ENTRIES or max(counts["param"], counts["tag"]) > MOST_PARAMS_OR_TAGS:
                    break
                batch.append(record)
                end += len(line)
        return batch, end

    def _catch_up(self) -> None:
        """A resumed run: learn what the server has already, and set the run going again."""
        run = self._client.get_run(self._stored)
        self._server_params = set(run.data.params)
        for key in run.data.metrics:
            history = self._client.get_metric_history(self._stored, key)
            self._server_steps[key] = max(point.step for point in history)
        self._client.update_run(self._stored, status="RUNNING")
        self._caught_up = True

    def _send(self, batch: list[Record]) -> None:
        """Deliver records; set aside those that the server will never take. Any other failure is raised."""
        try:
            self._send_once(batch)
        except Exception as error:
            if not refused(error):
                raise
            if len(batch) > 1:
                self._send(batch[: len(batch) // 2])
                self._send(batch[len(batch) // 2 :])
                return
            logger.warning("tracking refused a record, see %s: %s", self.rejected, error)
            with self.rejected.open("a") as file:
                file.write(json.dumps(batch[0]) + "\n")

    def _send_once(self, batch: list[Record]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        first = batch[0]
        if first["kind"] == "text":
            self._client.log_text(self._stored, first["text"], first["path"])
        elif first["kind"] == "artifacts":
            with moving_files(self.uri):
                self._client.log_artifacts(self._stored, first["folder"], first["path"])
        elif first["kind"] == "status":
            self._client.set_terminated(self._stored, first["status"], end_time=first["timestamp"])
        else:
            self._client.log_batch(
                self._stored,
                metrics=[
                    Metric(r["key"], r["value"], r["timestamp"], r["step"])
                    for r in batch
                    if r["kind"] == "metric" and r["step"] > self._server_steps.get(r["key"], -1)
                ],
                params=[
                    Param(r["key"], r["value"])
                    for r in batch
                    if r["kind"] == "param" and r["key"] not in self._server_params
                ],
                tags=[RunTag(r["key"], r["value"]) for r in batch if r["kind"] == "tag"],
            )

    def _waiting(self) -> int:
        with self._writing, self.outbox.open("rb") as file:
            file.seek(self._sent)
            return sum(1 for _ in file) + len(self._unwritten)


def clean_key(name: str) -> str:
    """A name as MLflow takes it: letters, digits and "_-. :/"; "@" becomes "_at_", all else "_"."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))[:LONGEST_KEY]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as one, keys joined by dots, values as YAML would write them on one line."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def environment_tags(folder: Path | None = None) -> dict[str, str]:
    """Versions of antdist, Python and the libraries, and the git commit of `folder` (default: the working directory)."""
    tags = {"antdist.version": __version__, "version.python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{library}"] = importlib.metadata.version(library)
    commit = _git("rev-parse", "HEAD", folder=folder)
    if commit:
        tags["mlflow.source.git.commit"] = commit
        changes = _git("status", "--porcelain", "--untracked-files=no", folder=folder)
        if changes is not None:
            tags["git.changed"] = str(bool(changes)).lower()
    return tags


def _git(*arguments: str, folder: Path | None) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or a slow disk: no tag
        return None
    return done.stdout.strip()
