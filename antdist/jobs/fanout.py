"""`antdist fanout`: a Ray job per trial, then a job per target that judges and registers.

A survey finds what is done already; it runs on the cluster where this machine is not part of it. So a fan-out may be started
from anywhere and repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_args

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from antdist.config.load import load_config
from antdist.config.schema import RelearnConfig, Strategy
from antdist.data.entries import PLAIN_NAME
from antdist.distributed.ray_session import is_inside_job, local_head, sigterm_as_interrupt
from antdist.errors import UserError
from antdist.io.logs import get_logger
from antdist.io.progress import make_bar
from antdist.jobs.client import POLL_SECONDS, Cluster, JobResult, join_ray, run_key
from antdist.jobs.submission import Submission, make_submission, resolve_config
from antdist.jobs.survey import Survey, survey
from antdist.report import Report, count
from antdist.runs.inputs import available_modalities, open_domains
from antdist.runs.parent import check_parent_named
from antdist.runs.trials import Trial, strategies_of

if TYPE_CHECKING:
    from antdist.evaluation.report import Row

logger = get_logger(__name__)

ALL = "all"
MOST_SEEDS = 1000
OUTAGE_SECONDS = 600.0  # for which the cluster may be unreachable while its jobs continue
RERUN = "run the same command again"
T = TypeVar("T")


@dataclass(frozen=True)
class FanoutRequest:
    """What to run: `targets` is None for `all`; strategies and seeds are those of `config`."""

    config: RelearnConfig
    targets: list[str] | None


@dataclass(frozen=True)
class Task:
    """A job of the fan-out: a trial, or (None) a target's verdict."""

    target: str
    trial: Trial | None
    submission: Submission

    def __str__(self) -> str:
        return f"{self.target} " + ("verdict" if self.trial is None else str(self.trial))


@dataclass(frozen=True)
class Failure:
    """A task that failed."""

    task: str
    job: str
    why: str


class Jobs(Protocol):
    """What the fan-out needs of a cluster."""

    def active_jobs(self) -> dict[tuple[str, ...], str]: ...
    def submit(self, submission: Submission) -> str: ...
    def ended(self, job: str) -> JobResult | None: ...
    def why(self, job: str) -> str: ...
    def logs(self, job: str) -> str: ...
    def ask_to_stop(self, job: str) -> bool: ...


@dataclass(repr=False)
class FanoutResult(Report):
    """The result of a fan-out: the verdict of each target, and the failures."""

    targets: list[str]
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: int = 0

    def rows(self) -> dict[str, list[Row]]:
        from antdist.evaluation.report import read_row

        return {
            target: [read_row(row) for row in self.verdicts[target]["test"]]
            for target in self.targets
            if target in self.verdicts
        }

    def lines(self) -> list[str]:
        from antdist.evaluation.report import read_verdict, transfer_table

        rows, lines = self.rows(), [f"note: {note}" for note in self.notes]
        if rows:
            champions = {target: _describe_champion(self.verdicts[target]) for target in rows}
            validation = {
                target: {s: read_verdict(v) for s, v in self.verdicts[target].get("validation verdicts", {}).items()}
                for target in rows
            }
            lines += [
                "best epoch of each trial by validation Recall@10; the validation transfer decides on the champion:"
            ]
            lines += [*transfer_table(rows, champions, validation).splitlines(), *_count_transfers(rows)]
        for target in self.targets:
            lines += [
                f"{target}: {note}"
                for note in self.verdicts.get(target, {}).get("notes", [])
                if note.startswith("not ") or "stays champion" in note
            ]
            if target not in self.verdicts and f"{target} verdict" not in {failure.task for failure in self.failures}:
                lines.append(f"{target}: no strategy is trained with all seeds")
        lines += [f"failed: {f.task}: {f.why} (antdist logs {f.job})" for f in self.failures]
        if self.left:
            lines.append(f"{RERUN}: {count(self.left, 'job is', 'jobs are')} left")
        return lines

    def to_json(self) -> dict[str, Any]:
        return {
            "targets": {target: self.verdicts.get(target) for target in self.targets},
            "failed": [asdict(failure) for failure in self.failures],
            "notes": self.notes,
            "left": self.left,
        }

    def records(self) -> list[dict[str, Any]]:
        return [{"target": target, **row.record()} for target, rows in self.rows().items() for row in rows]


def _describe_champion(verdict: dict[str, Any]) -> tuple[str, str]:
    """Return the strategy whose row shows the champion, and the text for it."""
    if "chosen" not in verdict:
        return verdict["test"][0]["strategy"], "not decided"
    holder = verdict["holder"]
    if holder == verdict["model"]:
        return verdict["chosen"], holder
    return verdict["chosen"], f"none ({verdict['model']} not promoted)" if holder is None else f"{holder} stays"


def _count_transfers(rows: dict[str, list[Row]]) -> list[str]:
    """Count for each strategy the targets with each kind of transfer."""
    found: dict[str, list[str]] = {}
    for row in (row for of_target in rows.values() for row in of_target if row.verdict is not None):
        found.setdefault(row.strategy, []).append(row.verdict.transfer if row.verdict else "")
    kinds = ("positive", "none", "negative", "unknown")
    return [
        f"{strategy}: transfer on test users {', '.join(f'{kind} on {ts.count(kind)}' for kind in kinds if kind in ts)} of {len(ts)} targets"
        for strategy, ts in found.items()
    ]


# -- what is asked for -----------------------------------------------------------------------------------------------


def read_request(
    file: Path | None,
    overrides: Sequence[str],
    targets: str,
    *,
    strategies: str | None = None,
    seeds: str | None = None,
    parent: str | None = None,
) -> FanoutRequest:
    """Read the configuration, changed by the command's options. Raises UserError."""
    config = load_config(RelearnConfig, file, overrides)
    changes: dict[str, Any] = {}
    if strategies is not None:
        changes["strategy"] = read_strategies(strategies)
    if seeds is not None:
        changes["seeds"] = read_seeds(seeds)
    if parent is not None:
        changes["parent"] = parent
    return make_request(config.model_copy(update=changes), None if targets.strip() == ALL else read_targets(targets))


def make_request(config: RelearnConfig, targets: list[str] | None) -> FanoutRequest:
    """Make the request of a configuration, whose own `target` is ignored. `targets`: None for all."""
    return FanoutRequest(config.model_copy(update={"target": None, "strategy": strategies_of(config)}), targets)


def read_targets(text: str) -> list[str]:
    """Read comma-separated domain names, each a plain folder name and given once. Raises UserError."""
    names = _words(text, "--targets", "name prepared domains with commas, or all")
    for name in names:
        if not re.fullmatch(PLAIN_NAME, name):
            raise UserError(
                f"{name!r} is not the name of a domain", where="--targets", remedy="letters, digits, dots, dashes only"
            )
    return names


def read_strategies(text: str) -> list[Strategy]:
    """Read comma-separated strategies, into the schema's order. Raises UserError."""
    known: tuple[Strategy, ...] = get_args(Strategy)
    words = _words(text, "--strategies", f"name some of {', '.join(known)}")
    for word in words:
        if word not in known:
            raise UserError(f"unknown strategy {word!r}", where="--strategies", remedy=f"known: {', '.join(known)}")
    return [strategy for strategy in known if strategy in words]


def read_seeds(text: str) -> list[int]:
    """Read `0-4`, `0,2,5` or a mixture, each seed given once. Raises UserError."""
    remedy = "write for example 0-4 or 0,2,5"
    seeds: list[int] = []
    for word in _words(text, "--seeds", remedy):
        found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", word)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise UserError(f"{word!r} is neither a seed nor a range of seeds", where="--seeds", remedy=remedy)
        if len(seeds) + last - first >= MOST_SEEDS:
            raise UserError(f"more than {MOST_SEEDS} seeds", where="--seeds", remedy=remedy)
        seeds += range(first, last + 1)
    if twice := [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
        raise UserError(f"the seed {twice[0]} is named twice", where="--seeds", remedy=remedy)
    return seeds


def _words(text: str, where: str, remedy: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UserError("names nothing" if not text.strip() else "a name is empty", where=where, remedy=remedy)
    if twice := [word for word in words if words.count(word) > 1]:
        raise UserError(f"{twice[0]!r} is named twice", where=where, remedy=remedy)
    return words


def check_request(wanted: FanoutRequest, here: bool) -> FanoutRequest:
    """Check what this machine can see, and make folders absolute. Raises UserError."""
    targets = wanted.targets
    # the checks of a configuration with one target hold for each
    config = resolve_config(wanted.config.model_copy(update={"target": targets[0] if targets else ALL}), here)
    check_parent_named(config)
    if config.tracking.registered_model is not None and targets != [config.target]:
        raise UserError(
            "several targets cannot share a name in the registry",
            where="tracking.registered_model",
            remedy="leave it out: each is registered as NAME-TARGET",
        )
    if targets and Path(config.data.root).is_dir():
        for domain in open_domains(config.data, targets, "--targets"):
            available_modalities(config, domain)
    return FanoutRequest(config, targets)


# -- the jobs --------------------------------------------------------------------------------------------------------


def fanout(
    wanted: FanoutRequest, address: str | None, *, code: str, parallel: int, dry_run: bool = False
) -> Survey | FanoutResult:
    """Survey, then run what is left of the fan-out.

    Raises:
        UserError: by `check_request`, `survey` or the cluster.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the running jobs are stopped.
    """
    here = not (address or os.environ.get("RAY_ADDRESS"))
    wanted = check_request(wanted, here)
    if here or (dry_run and is_inside_job()):
        found = survey(wanted.config, wanted.targets)
        if dry_run:
            return found
    if not here:
        cluster = Cluster(address)
        found = survey_on_cluster(cluster, wanted, code)
        return found if dry_run else run_jobs(cluster, wanted.config, found, here=False, code=code, parallel=parallel)
    if not found.left:
        return FanoutResult(list(found.targets), _verdicts(found), notes=found.notes)
    with local_head(wanted.config.ray) as (address, ray_address):
        logger.info(f"a local Ray; dashboard {address}")
        cluster = Cluster(address)
        return run_jobs(cluster, wanted.config, found, here=True, code=code, parallel=parallel, ray_address=ray_address)


def survey_on_cluster(cluster: Jobs, wanted: FanoutRequest, code: str) -> Survey:
    """Let a job make the survey, since this machine may see neither data nor runs."""
    targets = ",".join(wanted.targets) if wanted.targets else ALL
    arguments = [f"--targets={targets}", "--dry-run", "--json=-"]
    submission = make_submission("fanout", wanted.config, arguments, here=False, code=code)
    job = cluster.submit(submission)
    logger.info(f"job {job}: surveys data and runs")
    while (ended := _wait_out_outage(lambda: cluster.ended(job))) is None:
        time.sleep(POLL_SECONDS)
    surveyed = read_document(cluster.logs(job)) if ended.code == 0 else None
    if surveyed is None:
        raise UserError(
            cluster.why(job).removeprefix("error: ").rstrip("."), where=None, remedy=f"`antdist logs {job}`"
        )
    found = Survey.from_json(surveyed, wanted.config)
    for note in found.notes:
        logger.warning(f"note: {note}")
    return found


def run_jobs(
    cluster: Jobs,
    config: RelearnConfig,
    found: Survey,
    *,
    here: bool,
    code: str,
    parallel: int,
    ray_address: str | None = None,
) -> FanoutResult:
    """Run the jobs of the remaining trials, and that of a target's verdict once its trials have ended."""

    def task(target: str, trial: Trial | None) -> Task:
        changes: dict[str, Any] = {"target": target, "parent": found.parent}
        if trial is not None:
            changes |= {"strategy": trial.strategy, "seeds": [trial.seed]}
        arguments = ["--only=trial"] if trial else ["--only=verdict", "--json=-"]
        submission = make_submission("relearn", config.model_copy(update=changes), arguments, here=here, code=code)
        return Task(target, trial, join_ray(submission, ray_address) if ray_address else submission)

    done = FanoutResult(list(found.targets), _verdicts(found), notes=found.notes)
    open_trials = {target: {trial for trial in found.targets[target].todo} for target in found.targets}
    running = {target: len(trials) for target, trials in open_trials.items()}
    waiting = deque(task(target, trial) for target in found.targets for trial in found.targets[target].todo)
    waiting += [task(name, None) for name, target in found.targets.items() if not target.todo and not target.verdict]

    def finished(ended: Task, job: str, how: JobResult) -> None:
        if how.code != 0:
            done.failures.append(Failure(str(ended), job, cluster.why(job)))
        if ended.trial is None:
            if how.code == 0 and (verdict := read_document(cluster.logs(job))) is not None:
                done.verdicts[ended.target] = verdict
            return
        if how.code == 0:
            open_trials[ended.target].remove(ended.trial)
        running[ended.target] -= 1
        broken = {trial.strategy for trial in open_trials[ended.target]}
        if not running[ended.target] and broken != set(strategies_of(config)):
            waiting.appendleft(
                task(ended.target, None)
            )  # before other targets' trials: finished targets are shown early

    total = found.left
    with sigterm_as_interrupt(), _show_progress(total) as show:
        _run_tasks(cluster, waiting, parallel, finished, show)
    done.left = sum(map(len, open_trials.values()))
    done.left += sum("chosen" not in done.verdicts.get(target, {}) for target in done.targets)
    return done


def _run_tasks(
    cluster: Jobs,
    waiting: deque[Task],
    parallel: int,
    finished: Callable[[Task, str, JobResult], None],
    show: Callable[[int, int, int], None],
) -> None:
    """Keep up to `parallel` jobs submitted until no task is waiting; `finished` may add tasks.

    Active jobs of an earlier fan-out are followed instead of submitted again.
    """
    active, ended, failed = cluster.active_jobs(), 0, 0
    running_jobs = {job: task for task in waiting if (job := active.get(run_key(task.submission.metadata)))}
    for job, task in running_jobs.items():
        waiting.remove(task)
        logger.info(f"{task}: job {job} is already running")
    try:
        while waiting or running_jobs:
            while waiting and len(running_jobs) < parallel:
                task = waiting.popleft()
                job = cluster.active_jobs().get(run_key(task.submission.metadata)) or cluster.submit(task.submission)
                running_jobs[job] = task
                logger.info(f"{task}: job {job}")
            show(ended, len(running_jobs), failed)
            time.sleep(POLL_SECONDS)
            for job, task in list(running_jobs.items()):
                how = _wait_out_outage(lambda job=job: cluster.ended(job))  # type: ignore[misc]
                if how is None:
                    continue
                del running_jobs[job]
                ended, failed = ended + 1, failed + (how.code != 0)
                finished(task, job, how)
                logger.info(
                    f"{task}: {how.state}; {ended} ended, {failed} of them failed, {len(running_jobs)} run, {len(waiting)} wait"
                )
    except KeyboardInterrupt:
        _stop(cluster, list(running_jobs))
        raise
    except UserError:
        if running_jobs:
            logger.warning(f"{len(running_jobs)} jobs continue; {RERUN} to follow them")
        raise


def _stop(cluster: Jobs, jobs: list[str]) -> None:
    """Stop the jobs, which save their state first; a second Ctrl-C stops waiting for them."""
    logger.info(f"stopping {count(len(jobs), 'job')}, which save their state first; Ctrl-C leaves them running")
    unasked = set(jobs)  # a job that is just starting cannot be stopped yet
    while left := [job for job in jobs if cluster.ended(job) is None]:
        unasked = {job for job in unasked.intersection(left) if not cluster.ask_to_stop(job)}
        time.sleep(POLL_SECONDS)
    logger.info(f"stopped: {RERUN} to continue")


def _verdicts(found: Survey) -> dict[str, dict[str, Any]]:
    return {name: target.verdict for name, target in found.targets.items() if target.verdict is not None}


def read_document(log: str) -> dict[str, Any] | None:
    """Return what a job wrote for `--json -`: the last line that is a JSON object."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                return dict(json.loads(line))
    return None


def _wait_out_outage(work: Callable[[], T]) -> T:
    """Ask the cluster again while it is unreachable: its jobs continue meanwhile.

    Raises its UserError in the end.
    """

    def report_first(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            logger.warning(f"asking again for {OUTAGE_SECONDS / 60:.0f} minutes: {state.outcome.exception()}")

    attempts = Retrying(
        wait=wait_fixed(10 * POLL_SECONDS),
        stop=stop_after_delay(OUTAGE_SECONDS),
        retry=retry_if_exception_type(UserError),
        before_sleep=report_first,
        reraise=True,
    )
    return attempts(work)


@contextlib.contextmanager
def _show_progress(total: int) -> Iterator[Callable[[int, int, int], None]]:
    """Show a bar with the jobs that ended, run and failed on a terminal; elsewhere the log lines suffice."""
    if not sys.stderr.isatty():
        yield lambda ended, running, failed: None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("jobs"), BarColumn(), TextColumn("{task.fields[counts]}"), TimeRemainingColumn())
    with make_bar(*columns) as progress:
        bar = progress.add_task("", total=total, counts="")

        def show(ended: int, running: int, failed: int) -> None:
            counts = f"{ended - failed} of {total} done, {running} run, {failed} failed"
            progress.update(bar, completed=ended, counts=counts)

        yield show
