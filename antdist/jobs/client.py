"""Ray Jobs, through Ray's own client: submit, list, follow, stop, resume. Which token is sent is Ray's affair: RAY_AUTH_MODE,
RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from antdist.distributed.ray_compat import JOB_CLIENT_LOGGERS
from antdist.distributed.ray_session import check_listening, local_head
from antdist.errors import Preempted, UserError
from antdist.io.logs import get_logger
from antdist.jobs.submission import Submission, again, stage
from antdist.runs.folder import RunFolder
from antdist.training.status import Status

logger = get_logger(__name__)

# Ray kills a job's entry point 3 s after it asked it to stop; a step and a checkpoint take longer
STOP_SECONDS = 600
POLL_SECONDS = 0.5
SILENCE_SECONDS = 60.0  # of a log, until the head is asked how the job is
STATES = {"PENDING": "waits", "RUNNING": "runs", "SUCCEEDED": "done", "STOPPED": "stopped", "FAILED": "failed"}
COLUMNS = ("job", "state", "verb", "run", "step", "rate/s", "loss", "left", "MLflow")


@dataclass(frozen=True)
class Ended:
    """How a job ended; `code` is the exit code for a command that waited for it."""

    job: str
    state: str
    code: int


class Cluster:
    """The jobs of one Ray cluster.

    Args:
        address: http(s)://HEAD:8265 or what else Ray takes; None: RAY_ADDRESS.

    Raises (every method, too):
        UserError: nobody answers there, the token is refused, no such job.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS")
        if not self.address:
            raise UserError(
                "no cluster is named", where="--address", remedy="give http://HEAD:8265, or set RAY_ADDRESS"
            )
        with self._clear(), _over_ray_address(self.address):
            from ray.job_submission import JobSubmissionClient

            check_listening(self.address)
            self._client = JobSubmissionClient(self.address)
        for name in JOB_CLIENT_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)

    def submit(self, submission: Submission) -> str:
        """Send code and configuration, and have the job started; its id."""
        self._refuse_twice(submission)
        with tempfile.TemporaryDirectory() as folder, self._clear():
            environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
            if stage(submission, Path(folder)):
                environment["working_dir"] = folder
            return str(
                self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    runtime_env=environment,
                    metadata=dict(submission.metadata),
                    submission_id=submission.new_id(),
                )
            )

    def resume(self, job: str) -> str:
        """Submit the same again: it goes on with the same run. Raises UserError while the job, or another of its run, runs."""
        info = self._info(job)
        if not info.status.is_terminal():
            raise UserError(f"the job {STATES[info.status]}", where=job, remedy="stop it first: antdist stop JOB")
        try:
            submission = again(info.entrypoint, info.metadata or {})
        except KeyError:
            raise UserError(
                "was not submitted by `antdist submit`", where=job, remedy="submit it as it was before"
            ) from None
        return self.submit(submission)

    def stop(self, job: str) -> Ended:
        """Ask the job to save its state and leave; return when it has."""
        if not self.ask_to_stop(job):
            raise UserError(f"the job is no longer at work: {STATES[self._info(job).status]}", where=job)
        while not self._info(job).status.is_terminal():
            time.sleep(POLL_SECONDS)
        return self._ended(job)

    def ask_to_stop(self, job: str) -> bool:
        """Ask the job to save its state and leave; False if it has ended."""
        with self._clear(job):
            return bool(self._client.stop_job(job))

    def ended(self, job: str) -> Ended | None:
        """How the job ended; None while it waits or runs."""
        return self._ended(job) if self._info(job).status.is_terminal() else None

    def at_work(self) -> dict[tuple[str, ...], str]:
        """The jobs that wait or run, by `run_of` their metadata."""
        with self._clear():
            infos = [info for info in self._client.list_jobs() if not info.status.is_terminal()]
        return {run_of(info.metadata): info.submission_id for info in infos if info.metadata and info.submission_id}

    def why(self, job: str) -> str:
        """What a job that failed, or was stopped, said of it."""
        lines, info = self.logs(job).strip().splitlines(), self._info(job)
        mistakes = [line for line in lines if line.startswith("error: ")]
        if mistakes:
            return mistakes[-1]
        code = "" if info.driver_exit_code is None else f" with exit code {info.driver_exit_code}"
        said = lines[-1] if lines else (info.message or "nothing").strip().partition("\n")[0]
        return f"{STATES[info.status]}{code}; it said last: {said}"

    def logs(self, job: str) -> str:
        with self._clear(job):
            return str(self._client.get_job_logs(job))

    def follow(self, job: str) -> Ended:
        """Print the job's log as it grows, to its end."""
        self._info(job)  # there is such a job
        shown = 0

        async def show() -> None:
            nonlocal shown
            told, chunks = 0, aiter(self._client.tail_job_logs(job))
            while True:
                try:
                    text = await asyncio.wait_for(anext(chunks), SILENCE_SECONDS)
                except (StopAsyncIteration, TimeoutError):  # the end; or a head that is cut off, of which nobody tells
                    return
                told += len(text)
                if told > shown:  # a connection made anew begins with the first line
                    print(text[-(told - shown) :], end="", flush=True)
                    shown = told

        while True:
            with self._clear(job):
                asyncio.run(show())
            info = self._info(job)
            if info.status.is_terminal():
                if not shown and info.message:
                    logger.info(info.message.strip())
                return self._ended(job)
            time.sleep(POLL_SECONDS)

    def last_line(self, job: str) -> str:
        """What the job said last."""
        return (self.logs(job).strip().splitlines() or [""])[-1]

    def table(self, everything: bool = False) -> list[str]:
        """A line a job, oldest first: those that wait or run, or all that the cluster remembers. How a run goes is told where
        its folder is visible from this machine."""
        with self._clear():
            infos = [info for info in self._client.list_jobs() if info.submission_id is not None]
        infos.sort(key=lambda info: info.start_time or 0)
        rows = [_row(info) for info in infos if everything or not info.status.is_terminal()]
        if not rows:
            return ["no job waits or runs" + ("" if everything else "; --all lists those that ended")]
        widths = [max(len(row[column]) for row in [COLUMNS, *rows]) for column in range(len(COLUMNS))]
        return [
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [COLUMNS, *rows]
        ]

    def told(self, job: str) -> list[str]:
        """What a user does next with a job."""
        to = f" --address {self.address}"
        return [
            f"job {job}",
            f"dashboard: {self._client.get_address()}/#/jobs/{job}",
            f"follow it: antdist logs {job} -f{to}",
            f"stop, go on: antdist stop {job}{to}; antdist resume {job}{to}",
        ]

    def _info(self, job: str) -> Any:
        with self._clear(job):
            return self._client.get_job_info(job)

    def _ended(self, job: str) -> Ended:
        info = self._info(job)
        code = {"SUCCEEDED": 0, "STOPPED": Preempted.EXIT_CODE}.get(info.status, info.driver_exit_code or 1)
        return Ended(job, STATES[info.status], code)

    def _refuse_twice(self, submission: Submission) -> None:
        """Two jobs of one run would wait for each other, the second holding what it was given."""
        mine = submission.metadata
        if not mine["storage"]:
            return
        with self._clear():
            for info in self._client.list_jobs():
                if run_of(info.metadata or {}) == run_of(mine) and not info.status.is_terminal():
                    raise UserError(
                        f"the job {info.submission_id} is at work on this run",
                        where=f"{mine['storage']}/{mine['run']}",
                        remedy="wait for it or stop it, or choose another name=...",
                    )

    @contextlib.contextmanager
    def _clear(self, job: str | None = None) -> Iterator[None]:
        """Turn what Ray's client raises into a UserError."""
        from aiohttp import ClientError
        from ray.exceptions import AuthenticationError
        from requests import RequestException

        where = f"{self.address}" if job is None else job
        try:
            yield
        except AuthenticationError as error:
            raise UserError(
                f"the cluster refuses the token ({str(error).partition(chr(10))[0].rstrip('.')})",
                where=where,
                remedy="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that holds the cluster's token",
            ) from None
        except (OSError, ValueError, RuntimeError, RequestException, ClientError) as error:
            if "status code 404" in str(error) and job is not None:
                raise UserError("no such job", where=job, remedy="`antdist jobs --all` lists them") from None
            raise UserError(
                f"Ray's job server does not do it ({str(error).strip().partition(chr(10))[0]})",
                where=where,
                remedy="check the address, and that the head is up with its dashboard (http://HEAD:8265)",
            ) from None


def run_of(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What two jobs that are at work must not share."""
    return tuple(metadata.get(key, "") for key in ("verb", "run", "storage"))


def joining(submission: Submission, drivers: str) -> Submission:
    """Whose driver joins the Ray at this address: where several Rays run on a machine, Ray may name any of them to the job."""
    return replace(submission, entrypoint=f"RAY_ADDRESS={shlex.quote(drivers)} {submission.entrypoint}")


def submit_here(submission: Submission) -> Ended:
    """On a local Ray, started for it and stopped at its end; Ctrl-C or SIGTERM stop the job first, so that its state is
    saved."""
    with local_head(submission.ray) as (address, drivers):
        cluster = Cluster(address)
        job = cluster.submit(joining(submission, drivers))
        logger.info(f"job {job} on a local Ray; dashboard {address}")
        try:
            return cluster.follow(job)
        except KeyboardInterrupt:
            logger.info(f"stopping {job}")
            cluster.stop(job)
            logger.info(cluster.last_line(job))
            raise


def _row(info: Any) -> tuple[str, ...]:
    metadata = info.metadata or {}
    run, storage = metadata.get("run", ""), metadata.get("storage", "")
    folder = Path(storage) / run if storage and run else None
    live = _live(folder, info) if folder is not None and info.status == "RUNNING" else None
    figures = ("", "", "", "") if live is None else (
        f"{live.step}/{live.steps}", f"{live.rate:,.0f}", f"{live.loss:.4f}", f"{live.left / 60:.1f} min",
    )  # fmt: skip
    return (
        info.submission_id, STATES[info.status], metadata.get("verb", ""), run, *figures,
        _link(folder, metadata.get("mlflow", "")),
    )  # fmt: skip


def _live(folder: Path, info: Any) -> Status | None:
    """How the run goes, if this job has said so: its folder may hold what an earlier one said."""
    file = RunFolder(folder).status_file
    with contextlib.suppress(OSError, UserError, TypeError):  # nothing, or nothing whole
        if file.stat().st_mtime * 1000 >= (info.start_time or 0):
            return RunFolder(folder).read_status()
    return None


def _link(folder: Path | None, uri: str) -> str:
    """The run's page in MLflow; of a store without a server, the run's id."""
    record = None
    with contextlib.suppress(OSError, UserError):
        record = RunFolder(folder).read_record() if folder else None
    if record is None or not record.run_id:
        return uri if uri.startswith("http") else ""
    return f"{uri}/#/runs/{record.run_id}" if uri.startswith("http") else record.run_id


@contextlib.contextmanager
def _over_ray_address(address: str) -> Iterator[None]:
    """Ray's client takes RAY_ADDRESS before the address that it is given; what the user typed counts more."""
    variable = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(variable)
    os.environ[variable] = address
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
