"""One MLflow run for each job: training never waits for it, and each record arrives once.

`TrackedRun.log` appends to the outbox on disk and returns; a thread of its own delivers in order (`outbox.py` has the
argument why nothing is lost or doubled).

A run that starts while the server is unavailable gets a local id, `offline-...`. Its MLflow run is created by the first
process that reaches the server and carries the local id as a tag: whoever creates it searches for that tag first, so it
is created once even if the answer to the first attempt was lost.
"""

from __future__ import annotations

import json
import math
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from antdist.errors import UserError
from antdist.io.files import read_json, write_json
from antdist.io.logs import get_logger
from antdist.tracking.outbox import Outbox, Record
from antdist.tracking.store import (
    StoreUnavailable,
    artifact_location,
    check_reachable,
    connect,
    is_refusal,
    redact,
    retry_unavailable,
    transfer_artifacts,
    translate_errors,
)
from antdist.tracking.tags import clean_key, environment_tags, flatten

DELIVERY_SECONDS = 2.0  # between deliveries
MAX_RETRY_SECONDS = 60.0  # between attempts while the server is unavailable
OFFLINE = "offline-"
OFFLINE_TAG = "antdist.offline"
MAX_PARAM, MAX_TAG = 6000, 8000  # characters that MLflow accepts in a value

logger = get_logger(__name__)


@dataclass(frozen=True)
class Undelivered:
    """How many records a run could not deliver in time, and the file where they wait."""

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
    """Start a run, or continue the run `run_id` (for which the server may be unavailable).

    Args:
        folder: the run's local folder, which holds the outbox.
        config: the resolved configuration, nested (`model_dump(mode="json")`): becomes params with dotted keys, and
            complete the artifact `config.yaml`. Credentials in URIs are cut out.
        tags: added to `environment_tags`.
        offline_ok: whether a new run may start without a server.

    Raises:
        UserError: a new run without a server (unless `offline_ok`), a deleted experiment, an unknown `run_id`.
    """
    if run_id is None:
        try:
            check_reachable(uri)
            run_id = _create_run(uri, experiment, name)
        except StoreUnavailable as error:
            if not offline_ok:
                raise
            logger.warning("the run starts offline, its records wait in the outbox: %s", error)
            run_id = OFFLINE + uuid.uuid4().hex
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{run_id}.json", {"experiment": experiment, "name": name})
        resumed = False
    else:
        check_run_exists(uri, run_id)
        resumed = True
    run = TrackedRun(uri, run_id, folder, resumed=resumed)
    run.set_tags({**environment_tags(), **(tags or {})})
    if config is not None:
        run.log_params(config)
        run.log_text("config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    return run


def resolve_run_id(uri: str, run_id: str, folder: Path) -> str:
    """Return the id that the server has for a run, and create there a run that started offline.

    Retries for about two minutes while the store is unavailable.

    Raises:
        UserError: the store stays unavailable.
    """
    return retry_unavailable(lambda: _resolve_run_id(uri, run_id, folder), uri)


def _resolve_run_id(uri: str, run_id: str, folder: Path) -> str:
    file = folder / f"{run_id}.json"
    known = read_json(file) if run_id.startswith(OFFLINE) else {"run_id": run_id}
    assert known is not None, f"{file} is gone"
    if "run_id" not in known:
        # search first: an earlier attempt may have created the run and lost the answer
        client, experiment = connect(uri), _ensure_experiment(uri, known["experiment"])
        found = client.search_runs([experiment], f"tags.`{OFFLINE_TAG}` = '{run_id}'", max_results=1)
        run = found[0] if found else client.create_run(experiment, run_name=known["name"], tags={OFFLINE_TAG: run_id})
        known["run_id"] = run.info.run_id
        write_json(file, known)
    return str(known["run_id"])


def _create_run(uri: str, experiment: str, name: str) -> str:
    with translate_errors(uri):
        return str(connect(uri).create_run(_ensure_experiment(uri, experiment), run_name=name).info.run_id)


def _ensure_experiment(uri: str, experiment: str) -> str:
    """Return the id of an experiment, created if there is none."""
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            client.create_experiment(experiment, artifact_location=artifact_location(uri))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another job was faster
                raise
        found = client.get_experiment_by_name(experiment)
    if found.lifecycle_stage != "active":
        raise UserError(
            f"the experiment {experiment!r} was deleted",
            where="tracking.experiment",
            remedy=f"restore it with `mlflow experiments restore --experiment-id {found.experiment_id}` or choose another name",
        )
    return str(found.experiment_id)


def check_run_exists(uri: str, run_id: str) -> None:
    """Raise UserError if the store does not know the run; log a warning if the store is unavailable."""
    from mlflow.exceptions import MlflowException

    if run_id.startswith(OFFLINE):
        return
    try:
        check_reachable(uri)
        connect(uri).get_run(run_id)
    except (UserError, MlflowException) as error:
        if is_refusal(error):
            raise UserError(
                f"the tracking store knows no run {run_id!r}",
                where=redact(uri),
                remedy="check tracking.uri, or start a new run",
            ) from None
        logger.warning(
            "the tracking store is unavailable, the run continues and its records wait: %s", redact(str(error))
        )


class TrackedRun:
    """A run being written, by one process at a time: rank 0, or the driver before and after."""

    def __init__(self, uri: str, run_id: str, folder: Path, *, resumed: bool) -> None:
        self.uri, self.run_id, self._folder = uri, run_id, folder
        self.outbox = Outbox(folder / f"outbox-{run_id}.jsonl")
        self.rejected = folder / f"rejected-{run_id}.jsonl"
        self._client: Any = None
        self._server_id = ""  # the run's id at the server
        self._delivering = threading.Lock()
        self._unavailable = False
        self._caught_up = not resumed
        self._server_params: set[str] = set()
        self._server_steps: dict[str, int] = {}  # last step of each metric, when this resumed run caught up
        self._non_finite: set[str] = set()
        self._closing, self._deadline = threading.Event(), math.inf
        self._thread = threading.Thread(target=self._deliver_until_closed, name="tracking", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record one point a metric. Never waits for the server, never raises because of it.

        "@" in a name becomes "_at_" (MLflow refuses it). NaN is kept as NaN; infinity becomes NaN, since MLflow would
        store the largest float and ruin the plot; either is logged once a metric. Points that the run already has from
        before it was resumed are not recorded twice, and long curves are thinned in a long outage (`outbox.py`).
        """
        now = _timestamp()
        records = []
        for name, value in metrics.items():
            key, number = clean_key(name), float(value)
            if not math.isfinite(number):
                if key not in self._non_finite:
                    logger.warning("metric %s is %s at step %d: recorded as NaN", key, number, step)
                self._non_finite.add(key)
                number = math.nan
            if self.outbox.wants_point(key, step):
                records.append({"kind": "metric", "key": key, "value": number, "timestamp": now, "step": step})
        self.outbox.append(records)

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Record nested configuration as params with dotted keys, values cut at MLflow's limit."""
        flat = flatten(config).items()
        self.outbox.append([{"kind": "param", "key": clean_key(k), "value": redact(v)[:MAX_PARAM]} for k, v in flat])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags, values cut at MLflow's limit."""
        self.outbox.append(
            [{"kind": "tag", "key": clean_key(k), "value": redact(str(v))[:MAX_TAG]} for k, v in tags.items()]
        )

    def log_text(self, path: str, text: str) -> None:
        """Record a small text (YAML, JSON, a table) as the artifact `path`."""
        self.outbox.append([{"kind": "text", "path": path, "text": redact(text)}])

    def log_artifacts(self, folder: Path, path: str) -> None:
        """Record a folder's files as artifacts below `path`. They must stay in place until delivered."""
        self.outbox.append([{"kind": "artifacts", "folder": str(folder.resolve()), "path": path}])

    def flush(self) -> bool:
        """Deliver now, in the caller's thread, and return whether nothing is pending. May wait."""
        try:
            self._deliver()
        except Exception as error:  # the server, the network or a driver below MLflow may raise anything
            if not self._unavailable:
                logger.warning("tracking is unavailable, records wait in %s: %s", self.outbox.path, error)
            self._unavailable = True
            return False
        if self._unavailable:
            logger.info("tracking is available again, all records are delivered")
        self.outbox.report_thinning()
        self._unavailable = False
        return True

    def finish(self, status: str | None = "FINISHED", timeout: float = 30.0) -> Undelivered | None:
        """End this process's part within `timeout` seconds.

        Args:
            status: FINISHED, FAILED or KILLED ends the run; None leaves it running for another process to continue.

        Returns:
            None if everything is delivered, else what is pending and where.
        """
        if status is not None:
            self.outbox.append([{"kind": "status", "status": status, "timestamp": _timestamp()}])
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout)
        self.outbox.release()
        pending = self.outbox.count_pending()
        if not pending:
            return None
        logger.warning(
            "%d tracking records of run %s are not delivered; they wait in %s", pending, self.run_id, self.outbox.path
        )
        self.outbox.report_thinning()
        return Undelivered(pending, self.outbox.path)

    def _deliver_until_closed(self) -> None:
        wait = DELIVERY_SECONDS
        while not self._closing.wait(wait):
            wait = DELIVERY_SECONDS if self.flush() else min(2 * wait, MAX_RETRY_SECONDS)
        while not self.flush() and time.monotonic() < self._deadline:
            time.sleep(0.5)

    def _deliver(self) -> None:
        with self._delivering:
            self.outbox.append([])  # what the disk refused before
            if self._client is None:
                self._client = connect(self.uri)
            if not self._server_id:
                self._server_id = _resolve_run_id(self.uri, self.run_id, self._folder)
            if not self._caught_up:
                self._catch_up()
            batch, end = self.outbox.next_batch()
            while batch:
                self._send(batch)
                self.outbox.mark_sent(end)
                batch, end = self.outbox.next_batch()
            self.outbox.empty_if_sent()

    def _catch_up(self) -> None:
        """Read what the server already has of a resumed run, and set its status to running again."""
        run = self._client.get_run(self._server_id)
        self._server_params = set(run.data.params)
        for key in run.data.metrics:
            history = self._client.get_metric_history(self._server_id, key)
            self._server_steps[key] = max(point.step for point in history)
        self._client.update_run(self._server_id, status="RUNNING")
        self._caught_up = True

    def _send(self, batch: list[Record]) -> None:
        """Send records; move those that the server refuses to `rejected`. Other failures are raised."""
        try:
            self._send_once(batch)
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(batch) > 1:
                self._send(batch[: len(batch) // 2])
                self._send(batch[len(batch) // 2 :])
                return
            logger.warning("the tracking server refused a record, see %s: %s", self.rejected, error)
            with self.rejected.open("a") as file:
                file.write(json.dumps(batch[0]) + "\n")

    def _send_once(self, batch: list[Record]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        first = batch[0]
        if first["kind"] == "text":
            self._client.log_text(self._server_id, first["text"], first["path"])
        elif first["kind"] == "artifacts":
            with transfer_artifacts(self.uri):
                self._client.log_artifacts(self._server_id, first["folder"], first["path"])
        elif first["kind"] == "status":
            self._client.set_terminated(self._server_id, first["status"], end_time=first["timestamp"])
        else:
            self._client.log_batch(
                self._server_id,
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


def _timestamp() -> int:
    """Return milliseconds since the epoch, as MLflow keeps them."""
    return int(time.time() * 1000)
