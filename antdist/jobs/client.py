"""Ray Jobs through Ray's own client: submit, list, follow, stop, resume.

Ray chooses the token to send by RAY_AUTH_MODE, RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH.
"""

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
from antdist.io.progress import align_columns
from antdist.jobs.submission import Submission, restore_submission, stage_files
from antdist.runs.folder import RunFolder
from antdist.training.status import Status

logger = get_logger(__name__)

# By default Ray kills a job's entry point 3 s after the request to stop; a step and a checkpoint take longer
STOP_SECONDS = 600
POLL_SECONDS = 0.5
SILENCE_SECONDS = 60.0  # of a log, after which the job's status is polled
STATES = {"PENDING": "waits", "RUNNING": "runs", "SUCCEEDED": "done", "STOPPED": "stopped", "FAILED": "failed"}
COLUMNS = ("job", "state", "verb", "run", "step", "rate/s", "loss", "left", "MLflow")


@dataclass(frozen=True)
class JobResult:
    """The end of a job; `code` is the exit code for a command that waited for it."""

    job: str
    state: str
    code: int


class Cluster:
    """The jobs of one Ray cluster.

    Args:
        address: http(s)://HEAD:8265 or another form that Ray accepts; None: RAY_ADDRESS.

    Raises (every method, too):
        UserError: the server does not answer, it refuses the token, or there is no such job.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS")
        if not self.address:
            raise UserError(
                "no cluster is named", where="--address", remedy="give http://HEAD:8265, or set RAY_ADDRESS"
            )
        with self._translate_errors(), _prefer_address(self.address):
            from ray.job_submission import JobSubmissionClient

            check_listening(self.address)
            self._client = JobSubmissionClient(self.address)
        for name in JOB_CLIENT_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)

    def submit(self, submission: Submission) -> str:
        """Upload code and configuration, start the job, and return its id."""
        self._refuse_second_job(submission)
        with tempfile.TemporaryDirectory() as folder, self._translate_errors():
            environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
            if stage_files(submission, Path(folder)):
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
        """Submit the same job again, which resumes its run.

        Raises UserError while it, or another job of its run, is active.
        """
        info = self._info(job)
        if not info.status.is_terminal():
            raise UserError(f"the job {STATES[info.status]}", where=job, remedy="stop it first: antdist stop JOB")
        try:
            submission = restore_submission(info.entrypoint, info.metadata or {})
        except KeyError:
            raise UserError("was not submitted by `antdist submit`", where=job, remedy="submit it as before") from None
        return self.submit(submission)

    def stop(self, job: str) -> JobResult:
        """Stop the job, which saves its state first, and wait for its end."""
        if not self.ask_to_stop(job):
            raise UserError(f"the job has ended: {STATES[self._info(job).status]}", where=job)
        while not self._info(job).status.is_terminal():
            time.sleep(POLL_SECONDS)
        return self._ended(job)

    def ask_to_stop(self, job: str) -> bool:
        """Ask the job to save its state and exit; return False if it has ended."""
        with self._translate_errors(job):
            return bool(self._client.stop_job(job))

    def ended(self, job: str) -> JobResult | None:
        """Return how the job ended; None while it is pending or running."""
        return self._ended(job) if self._info(job).status.is_terminal() else None

    def active_jobs(self) -> dict[tuple[str, ...], str]:
        """Return the pending and running jobs by the `run_key` of their metadata."""
        with self._translate_errors():
            infos = [info for info in self._client.list_jobs() if not info.status.is_terminal()]
        return {run_key(info.metadata): info.submission_id for info in infos if info.metadata and info.submission_id}

    def why(self, job: str) -> str:
        """Return the last error, or the last line, that a failed or stopped job printed."""
        lines, info = self.logs(job).strip().splitlines(), self._info(job)
        errors = [line for line in lines if line.startswith("error: ")]
        if errors:
            return errors[-1]
        code = "" if info.driver_exit_code is None else f" with exit code {info.driver_exit_code}"
        last = lines[-1] if lines else (info.message or "nothing").strip().partition("\n")[0]
        return f"{STATES[info.status]}{code}; the last line of its log: {last}"

    def logs(self, job: str) -> str:
        """Return the job's log so far."""
        with self._translate_errors(job):
            return str(self._client.get_job_logs(job))

    def follow(self, job: str) -> JobResult:
        """Print the job's log as it grows, to its end."""
        self._info(job)  # raises if there is no such job
        shown = 0

        async def show() -> None:
            nonlocal shown
            received, chunks = 0, aiter(self._client.tail_job_logs(job))
            while True:
                try:
                    text = await asyncio.wait_for(anext(chunks), SILENCE_SECONDS)
                except (StopAsyncIteration, TimeoutError):  # the end, or a lost connection, which Ray does not report
                    return
                received += len(text)
                if received > shown:  # a new connection starts with the first line
                    print(text[-(received - shown) :], end="", flush=True)
                    shown = received

        while True:
            with self._translate_errors(job):
                asyncio.run(show())
            info = self._info(job)
            if info.status.is_terminal():
                if not shown and info.message:
                    logger.info(info.message.strip())
                return self._ended(job)
            time.sleep(POLL_SECONDS)

    def last_line(self, job: str) -> str:
        """Return the last line of the job's log."""
        return (self.logs(job).strip().splitlines() or [""])[-1]

    def table(self, everything: bool = False) -> list[str]:
        """Format a line per job, oldest first: the active ones, or all that the cluster remembers.

        A run's progress is shown where its folder is visible from this machine.
        """
        with self._translate_errors():
            infos = [info for info in self._client.list_jobs() if info.submission_id is not None]
        infos.sort(key=lambda info: info.start_time or 0)
        rows = [_row(info) for info in infos if everything or not info.status.is_terminal()]
        if not rows:
            return ["no job waits or runs" + ("" if everything else "; --all lists those that ended")]
        return align_columns([COLUMNS, *rows])

    def describe(self, job: str) -> list[str]:
        """Return a job's page, and the commands to follow, stop and resume it."""
        to = f" --address {self.address}"
        return [
            f"job {job}",
            f"dashboard: {self._client.get_address()}/#/jobs/{job}",
            f"follow it: antdist logs {job} -f{to}",
            f"stop, resume: antdist stop {job}{to}; antdist resume {job}{to}",
        ]

    def _info(self, job: str) -> Any:
        with self._translate_errors(job):
            return self._client.get_job_info(job)

    def _ended(self, job: str) -> JobResult:
        info = self._info(job)
        code = {"SUCCEEDED": 0, "STOPPED": Preempted.EXIT_CODE}.get(info.status, info.driver_exit_code or 1)
        return JobResult(job, STATES[info.status], code)

    def _refuse_second_job(self, submission: Submission) -> None:
        """Refuse a second job of a run: it would hold its resources while it waits for the first."""
        mine = submission.metadata
        if not mine["storage"]:
            return
        with self._translate_errors():
            for info in self._client.list_jobs():
                if run_key(info.metadata or {}) == run_key(mine) and not info.status.is_terminal():
                    raise UserError(
                        f"the job {info.submission_id} is working on this run",
                        where=f"{mine['storage']}/{mine['run']}",
                        remedy="wait for it or stop it, or choose another name=...",
                    )

    @contextlib.contextmanager
    def _translate_errors(self, job: str | None = None) -> Iterator[None]:
        """Raise the errors of Ray's client as UserError."""
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
                f"Ray's job server failed ({str(error).strip().partition(chr(10))[0]})",
                where=where,
                remedy="check the address, and that the head node runs with its dashboard (http://HEAD:8265)",
            ) from None


def run_key(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the metadata that two active jobs must not share."""
    return tuple(metadata.get(key, "") for key in ("verb", "run", "storage"))


def join_ray(submission: Submission, address: str) -> Submission:
    """Make the job's driver connect to the Ray at this address.

    With several on a machine, Ray may give it another one.
    """
    return replace(submission, entrypoint=f"RAY_ADDRESS={shlex.quote(address)} {submission.entrypoint}")


def submit_to_local_ray(submission: Submission) -> JobResult:
    """Run a job on a local Ray that is started for it.

    Ctrl-C and SIGTERM stop the job first, so that it saves its state.
    """
    with local_head(submission.ray) as (address, ray_address):
        cluster = Cluster(address)
        job = cluster.submit(join_ray(submission, ray_address))
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
    status = _read_status(folder, info) if folder is not None and info.status == "RUNNING" else None
    figures = ("", "", "", "") if status is None else (
        f"{status.step}/{status.steps}", f"{status.rate:,.0f}", f"{status.loss:.4f}", f"{status.left / 60:.1f} min",
    )  # fmt: skip
    return (
        info.submission_id, STATES[info.status], metadata.get("verb", ""), run, *figures,
        _mlflow_link(folder, metadata.get("mlflow", "")),
    )  # fmt: skip


def _read_status(folder: Path, info: Any) -> Status | None:
    """Read the run's status, unless it is older than this job, and so of an earlier one."""
    file = RunFolder(folder).status_file
    with contextlib.suppress(OSError, UserError, TypeError):  # no status, or a damaged one
        if file.stat().st_mtime * 1000 >= (info.start_time or 0):
            return RunFolder(folder).read_status()
    return None


def _mlflow_link(folder: Path | None, uri: str) -> str:
    """Return the run's page in MLflow, or its id if the store has no server."""
    record = None
    with contextlib.suppress(OSError, UserError):
        record = RunFolder(folder).read_record() if folder else None
    if record is None or not record.run_id:
        return uri if uri.startswith("http") else ""
    return f"{uri}/#/runs/{record.run_id}" if uri.startswith("http") else record.run_id


@contextlib.contextmanager
def _prefer_address(address: str) -> Iterator[None]:
    """Within the block Ray's client uses this address; otherwise it prefers RAY_ADDRESS."""
    variable = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(variable)
    os.environ[variable] = address
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
